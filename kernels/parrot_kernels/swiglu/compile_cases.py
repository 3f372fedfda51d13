"""Calls that compile every Triton kernel of this op."""

from __future__ import annotations

from collections.abc import Callable

import torch

from parrot_kernels.compile_only import Case
from parrot_kernels.swiglu import triton_impl


def _run(dtype: torch.dtype, rows: int, width: int, *, weighted: bool = True) -> Callable[[], None]:
    """Forward and backward of 16 segments."""

    def run() -> None:
        z = torch.empty(16, rows, 2, width, dtype=dtype, device="meta")
        weights = torch.empty(16, dtype=torch.float32, device="meta") if weighted else None
        triton_impl.swiglu_bwd(triton_impl.swiglu_fwd(z, weights), z, weights)

    return run


CASES = [
    Case(name="images_bf16", run=_run(torch.bfloat16, 577, 4096), archs=(80, 90, 100)),
    Case(name="tokens_bf16", run=_run(torch.bfloat16, 1, 768)),
    Case(name="unweighted_fp16", run=_run(torch.float16, 1, 2048, weighted=False)),
    Case(name="images_fp32", run=_run(torch.float32, 577, 4096)),
]
