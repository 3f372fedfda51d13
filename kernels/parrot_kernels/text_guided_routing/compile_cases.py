"""Calls that compile every Triton kernel of this op, at the sizes of Parrot-7B (H = 4096, E = 6)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from parrot_kernels.compile_only import Case
from parrot_kernels.text_guided_routing import triton_impl


def _call(dtype: torch.dtype, text_rows: int, num_experts: int = 6, with_grad_lse: bool = False) -> Callable[[], None]:
    """Forward and backward of 8 images over `text_rows` rows."""

    def meta(*sizes: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(sizes, dtype=of, device="meta")

    def run() -> None:
        spans = meta(8, of=torch.int32), meta(8, of=torch.int32)
        args = (meta(8, 4096), meta(text_rows, 4096), *spans, meta(num_experts, 4096))
        logits, lse = triton_impl.text_guided_routing_fwd(*args, 1 / 64)
        grad_lse = lse if with_grad_lse else None
        triton_impl.text_guided_routing_bwd(logits, grad_lse, *args, logits, lse, 1 / 64, (True, True, True))

    return run


# Text times queries and router; wgmma (HGMMA) takes 64 rows at least. Each call compiles blocks of both sizes.
_SHORT = {"fwd_kernel BLOCK_T=16": ("HMMA",), "bwd_scores_kernel BLOCK_T=16": ("HMMA",)}
_LONG = {"fwd_kernel BLOCK_T=64": ("HGMMA",), "bwd_scores_kernel BLOCK_T=64": ("HGMMA",)}

CASES = [
    Case(name="bf16", run=_call(torch.bfloat16, 512), archs=(80, 90, 100), instructions={**_SHORT, **_LONG}),
    Case(name="fp32", run=_call(torch.float32, 512, with_grad_lse=True)),
    Case(name="bf16_most_experts", run=_call(torch.bfloat16, 65536, num_experts=64)),
]
