"""Calls that compile every Triton kernel of this op, at the sizes of Parrot-7B (H = I = 4096, E = 6, V = 577)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from parrot_kernels.compile_only import Case
from parrot_kernels.fp8_experts import triton_impl

# (One choice an image: 1 makes kernels of their own, which no case of expert_mlp compiles.)
IMAGES, HIDDEN, EXPERTS, TOPK, ROWS = 4, 4096, 6, 1, 577
SCALES = (0.1, 1.0)


def _meta(*sizes: int, of: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(sizes, dtype=of, device="meta")


def _experts(form: str) -> Callable[[], None]:
    def run() -> None:
        x, probs = _meta(IMAGES, ROWS, HIDDEN), _meta(IMAGES, EXPERTS, of=torch.float32)
        args: tuple[Tensor, ...] = (x, _meta(EXPERTS, 2, HIDDEN, HIDDEN), _meta(EXPERTS, HIDDEN, HIDDEN), probs)
        if form == "topk":
            args += (_meta(IMAGES, TOPK, of=torch.int64), _meta(EXPERTS + 1, of=torch.int32))
            args += (_meta(IMAGES * TOPK, of=torch.int64),)
        getattr(triton_impl, f"expert_mlp_{form}_fwd")(*args, SCALES, True)

    return run


def _tokens() -> None:
    """Token-routed experts: rows gathered one by one, both layouts of weights."""
    x, w, offsets = _meta(64, 1, HIDDEN), _meta(16, 2, 1024, HIDDEN), _meta(17, of=torch.int32)
    plan, weights = _meta(128, of=torch.int64), _meta(128, of=torch.float32)
    h, _ = triton_impl.m_grouped_swiglu(x, w, offsets, plan, 2, weights, True)
    triton_impl.m_grouped_gemm(h, _meta(16, 1024, HIDDEN), offsets, None, 1, False)
    triton_impl.m_grouped_gemm(x, w[:, 0], offsets, plan, 2, True)


_PRODUCTS = {"m_grouped_kernel": ("QGMMA", "UTMALDG"), "_combine_kernel": ("QGMMA", "UTMALDG")}
CASES = [
    Case(name="dense", run=_experts("dense"), instructions=_PRODUCTS),
    Case(name="topk", run=_experts("topk"), instructions=_PRODUCTS),
    Case(name="tokens", run=_tokens, instructions={"m_grouped_kernel": ("QGMMA", "UTMALDG")}),
]
