"""Calls that compile every Triton kernel of this op: the gated blocks of MultiModal-GPT and the learners of Wings."""

from __future__ import annotations

from collections.abc import Callable

import torch

from parrot_kernels.compile_only import Case
from parrot_kernels.segment_attention import triton_impl


def _call(
    dtype: torch.dtype, num_keys: int, width: int, heads: int, kv_heads: int, with_grad_lse: bool = False
) -> Callable[[], None]:
    """Forward and backward of 4096 text rows."""

    def meta(*sizes: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(sizes, dtype=of, device="meta")

    def run() -> None:
        query, key, value = meta(4096, heads, width), meta(num_keys, kv_heads, width), meta(num_keys, kv_heads, width)
        inputs = query, key, value, meta(4096, of=torch.int32), meta(4096, of=torch.int32)
        out, lse = triton_impl.segment_attention_fwd(*inputs, width**-0.5)
        grad_lse = lse if with_grad_lse else None
        triton_impl.segment_attention_bwd(out, grad_lse, *inputs, out, lse, width**-0.5, (True, True, True))

    return run


_WGMMA = dict.fromkeys(("_fwd_kernel", "_query_bwd_kernel", "_key_bwd_kernel"), ("HGMMA",))

CASES = [
    Case(name="bf16_flamingo", run=_call(torch.bfloat16, 512, 64, 8, 8), archs=(80, 90, 100), instructions=_WGMMA),
    Case(name="bf16_lorra", run=_call(torch.bfloat16, 5832, 128, 32, 32, True), instructions=_WGMMA),
    Case(name="bf16_grouped", run=_call(torch.bfloat16, 5832, 128, 32, 8), instructions=_WGMMA),
    Case(name="fp16_256", run=_call(torch.float16, 512, 256, 8, 8), instructions=_WGMMA),
    Case(name="fp32_64", run=_call(torch.float32, 512, 64, 8, 8)),
    Case(name="fp32_128", run=_call(torch.float32, 512, 128, 8, 8)),
]
