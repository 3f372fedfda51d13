"""Calls that compile every Triton kernel of this op."""

from __future__ import annotations

from collections.abc import Callable

import torch

from parrot_kernels.compile_only import Case
from parrot_kernels.permute import triton_impl


def _run(dtype: torch.dtype, width: int, topk: int, *, weighted: bool = True) -> Callable[[], None]:
    """Both directions of 4096 rows, forward and backward."""

    def run() -> None:
        rows = 4096
        x = torch.empty(rows, width, dtype=dtype, device="meta")
        probs = torch.empty(rows, topk, dtype=torch.float32, device="meta") if weighted else None
        plan = torch.empty(rows * topk, dtype=torch.int64, device="meta")
        moved, _ = triton_impl.permute_fwd(x, probs, plan, topk)
        y = triton_impl.unpermute_fwd(moved, probs, plan, topk, rows)
        triton_impl.unpermute_bwd(y, moved, probs, plan, topk, (True, True))
        triton_impl.permute_bwd(moved, None, plan, topk, rows)

    return run


CASES = [
    Case(name="top8_bf16", run=_run(torch.bfloat16, 4096, 8), archs=(80, 90, 100)),
    Case(name="top2_unaligned_fp16", run=_run(torch.float16, 2049, 2)),
    Case(name="top1_unweighted_fp32", run=_run(torch.float32, 1536, 1, weighted=False)),
]
