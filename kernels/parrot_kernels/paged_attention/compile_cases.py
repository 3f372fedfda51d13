"""Calls that compile every Triton kernel of this op: answers of 64 requests, and their prompts."""

from __future__ import annotations

from collections.abc import Callable

import torch

from parrot_kernels.compile_only import Case
from parrot_kernels.paged_attention import triton_impl


def _call(
    dtype: torch.dtype, width: int, heads: int, groups: int, block_size: int, *, wings: bool = False
) -> Callable[[], None]:
    """64 requests of up to 4096 rows, a row of each."""

    def meta(*sizes: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(sizes, dtype=of, device="meta")

    def run() -> None:
        table = meta(64, 4096 // block_size, of=torch.int32)
        cache = meta(1024, groups, block_size, width)
        lengths = meta(65, of=torch.int32), meta(64, of=torch.int32)
        columns = meta(4096, 2) if wings else None
        visible = meta(1024, block_size, of=torch.bool) if wings else None
        query = meta(64, heads, width)
        triton_impl.paged_attention(query, cache, cache, table, *lengths, columns, visible, 1, width**-0.5)

    return run


_PRODUCTS = {"_paged_kernel M=16": ("HMMA",), "_paged_kernel M=64": ("HGMMA",)}

CASES = [
    Case(name="bf16_qwen2", run=_call(torch.bfloat16, 128, 28, 4, 16), archs=(80, 90, 100), instructions=_PRODUCTS),
    Case(name="bf16_llama", run=_call(torch.bfloat16, 128, 32, 32, 64)),
    Case(name="bf16_wings", run=_call(torch.bfloat16, 128, 32, 32, 16, wings=True), instructions=_PRODUCTS),
    Case(name="fp32_64", run=_call(torch.float32, 64, 8, 2, 16)),
]
