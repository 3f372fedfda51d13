"""Calls of the launchers that `parrot_kernels.compile_only` compiles without a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from parrot_kernels.compile_only import Case
from parrot_kernels.grouped_gemm import triton_impl

# (16 groups: numbers that 16 divides make kernels of their own, which no case of expert_mlp compiles.)
GROUPS, SEGMENTS, HIDDEN, FFN = 16, 32, 4096, 1024


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _run(rows: int, dtype: torch.dtype, hidden: int = HIDDEN, *, planned: bool) -> Callable[[], None]:
    """Forward and weight gradient of an expert's up-projection, and its plain products in both layouts of w."""
    plan = _meta(SEGMENTS, dtype=torch.int64) if planned else None
    offsets = _meta(GROUPS + 1, dtype=torch.int32)
    x, z = _meta(SEGMENTS, rows, hidden, dtype=dtype), _meta(SEGMENTS, rows, FFN, dtype=dtype)
    w = _meta(GROUPS, 2, FFN, hidden, dtype=dtype)

    def run() -> None:
        triton_impl.m_grouped_swiglu(x, w, offsets, plan, 2, _meta(SEGMENTS, dtype=torch.float32), True)
        triton_impl.m_grouped_gemm(x, w[:, 0], offsets, plan, 2, True)
        triton_impl.m_grouped_gemm(x, w[:, 0].transpose(1, 2), offsets, plan, 2, False)
        triton_impl.k_grouped_gemm(z, x, offsets, plan, 2)

    return run


_TENSOR_CORES = dict.fromkeys(("m_grouped_kernel", "k_grouped_kernel"), ("HGMMA",))
_TMA = dict.fromkeys(("m_grouped_kernel", "k_grouped_kernel"), ("HGMMA", "UTMALDG"))
CASES = [
    Case(name="in_place_bf16", run=_run(577, torch.bfloat16, planned=False), instructions=_TMA, archs=(80, 90)),
    Case(name="planned_images_bf16", run=_run(577, torch.bfloat16, planned=True), instructions=_TMA, archs=(80, 90)),
    Case(name="planned_tokens_bf16", run=_run(1, torch.bfloat16, planned=True), instructions=_TMA),
    Case(name="in_place_fp16", run=_run(577, torch.float16, planned=False), instructions=_TMA),
    Case(name="unaligned_bf16", run=_run(577, torch.bfloat16, HIDDEN + 1, planned=True), instructions=_TENSOR_CORES),
    Case(name="fp32", run=_run(577, torch.float32, planned=True)),
]
