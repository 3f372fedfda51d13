"""Calls that compile every Triton kernel of this op, at the sizes of Qwen1.5-7B (H = 4096, 151936 words)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from parrot_kernels.compile_only import Case
from parrot_kernels.linear_cross_entropy import triton_impl


def _call(dtype: torch.dtype, rows: int = 4096, width: int = 4096) -> Callable[[], None]:
    """Forward and backward; two chunks of the vocabulary at the default size."""

    def meta(*sizes: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(sizes, dtype=of, device="meta")

    def run() -> None:
        args = meta(rows, width), meta(151936, width), meta(rows, of=torch.int64)
        lse, target_logits = triton_impl.linear_cross_entropy_fwd(*args, 0)
        triton_impl.linear_cross_entropy_bwd(lse, target_logits, *args, lse, 0, (True, True))

    return run


_GEMMS = ("fwd_kernel", "grad_logits_kernel", "matmul_kernel")
_TMA = dict.fromkeys(_GEMMS, ("HGMMA", "UTMALDG"))
_WGMMA = dict.fromkeys(_GEMMS, ("HGMMA",))

CASES = [
    Case(name="bf16", run=_call(torch.bfloat16), archs=(80, 90, 100), instructions=_TMA),
    Case(name="fp16", run=_call(torch.float16), instructions=_TMA),
    Case(name="bf16_odd_width", run=_call(torch.bfloat16, width=4100), instructions=_WGMMA),
    Case(name="fp32", run=_call(torch.float32)),
]
