"""Calls that compile every Triton kernel of this op: heads of Wings on Qwen1.5-7B (128 wide), and the widths around."""

from __future__ import annotations

from collections.abc import Callable

import torch

from parrot_kernels.compile_only import Case
from parrot_kernels.router_attention import triton_impl


def _call(dtype: torch.dtype, width: int, kv_heads: int = 8, slices: bool = False) -> Callable[[], None]:
    """Forward and backward of 4 samples in 4096 rows; `slices` with positions and a gradient of lse."""

    def meta(*sizes: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(sizes, dtype=of, device="meta")

    def run() -> None:
        query, columns = meta(4096, 32, width), meta(4096, 2)
        key, value = meta(4096, kv_heads, width), meta(4096, kv_heads, width)
        lengths, positions = meta(5, of=torch.int32), meta(4, 2, of=torch.int32) if slices else None
        inputs = query, key, value, columns, lengths, lengths, positions
        out, extra, lse = triton_impl.router_attention_fwd(*inputs, 2048, 2048, width**-0.5)
        grad_lse = lse if slices else None
        results = out, extra, lse, 2048, 2048, width**-0.5
        triton_impl.router_attention_bwd(out, extra, grad_lse, *inputs, *results, (True, True, True, True))

    return run


_WGMMA = dict.fromkeys(("fwd_kernel", "bwd_kernel"), ("HGMMA",))

CASES = [
    Case(name="bf16_128", run=_call(torch.bfloat16, 128), instructions=_WGMMA),
    Case(name="bf16_128_slices", run=_call(torch.bfloat16, 128, kv_heads=32, slices=True), instructions=_WGMMA),
    Case(name="bf16_64", run=_call(torch.bfloat16, 64), instructions=_WGMMA),
    Case(name="bf16_80", run=_call(torch.bfloat16, 80), instructions=_WGMMA),
    Case(name="fp16_256", run=_call(torch.float16, 256), instructions=_WGMMA),
    Case(name="fp32_64", run=_call(torch.float32, 64)),
    Case(name="fp32_128", run=_call(torch.float32, 128)),
]
