"""Calls that compile every Triton kernel of this op, at the sizes of Parrot-7B (H = I = 4096, E = 6, V = 577)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from parrot_kernels.compile_only import Case
from parrot_kernels.expert_mlp import triton_impl

IMAGES, HIDDEN, EXPERTS, TOPK = 4, 4096, 6, 2
SCALES = (0.1, 1.0)


def _run(form: str, dtype: torch.dtype, *, rows: int = 577, ffn: int = 4096, save_z: bool = True) -> Callable[[], None]:
    """Forward and backward."""

    def meta(*sizes: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(sizes, dtype=of, device="meta")

    def run() -> None:
        x, probs = meta(IMAGES, rows, HIDDEN), meta(IMAGES, EXPERTS, of=torch.float32)
        args: tuple[Tensor, ...] = (x, meta(EXPERTS, 2, ffn, HIDDEN), meta(EXPERTS, ffn, HIDDEN), probs)
        if form == "topk":
            args += (meta(IMAGES, TOPK, of=torch.int64), meta(EXPERTS + 1, of=torch.int32))
            args += (meta(IMAGES * TOPK, of=torch.int64),)
        _, z = getattr(triton_impl, f"expert_mlp_{form}_fwd")(*args, SCALES, save_z)
        getattr(triton_impl, f"expert_mlp_{form}_bwd")(x, *args, z, SCALES, (True,) * 4)

    return run


_PRODUCTS = ("m_grouped_kernel", "k_grouped_kernel", "_combine_kernel")
_TMA = dict.fromkeys(_PRODUCTS, ("HGMMA", "UTMALDG"))
_GROUPED = dict.fromkeys(_PRODUCTS[:2], ("HGMMA", "UTMALDG"))
_TENSOR_CORES = dict.fromkeys(_PRODUCTS, ("HGMMA",))
CASES = [
    Case(name="dense_bf16", run=_run("dense", torch.bfloat16), instructions=_TMA, archs=(80, 90)),
    Case(name="dense_bf16_recompute", run=_run("dense", torch.bfloat16, save_z=False)),
    Case(name="topk_bf16", run=_run("topk", torch.bfloat16), instructions=_TMA, archs=(80, 90)),
    Case(name="topk_tokens_bf16", run=_run("topk", torch.bfloat16, rows=1), instructions=_GROUPED),
    Case(name="topk_unaligned_bf16", run=_run("topk", torch.bfloat16, ffn=4095), instructions=_TENSOR_CORES),
    Case(name="topk_fp16", run=_run("topk", torch.float16), instructions=_TMA),
    Case(name="dense_fp32", run=_run("dense", torch.float32)),
    Case(name="topk_fp32", run=_run("topk", torch.float32)),
]
