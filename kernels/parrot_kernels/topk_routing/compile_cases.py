"""Calls that compile every Triton kernel of this op: image routing of Parrot, token routing of known models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from parrot_kernels.compile_only import Case
from parrot_kernels.topk_routing import triton_impl


def _call(rows: int, num_experts: int, topk: int, *options: Any, dtype: torch.dtype = torch.float32) -> Callable:
    """Forward, and backward with the gradient of every output."""

    def run() -> None:
        logits = torch.empty(rows, num_experts, dtype=dtype, device="meta")
        route = triton_impl.topk_routing_fwd(logits, topk, *options)
        renormalize, score_function, scaling_factor = (*options, *("softmax", 1.0)[len(options) - 1 :])[:3]
        triton_impl.topk_routing_bwd(*route[:5], logits, route[5], renormalize, score_function, scaling_factor)

    return run


_BIAS = torch.empty(256, device="meta")

CASES = [
    Case(name="parrot_images", run=_call(64, 6, 2, True), archs=(80, 90, 100)),
    Case(name="qwen3_30b_a3b_tokens", run=_call(65536, 128, 8, True, dtype=torch.bfloat16)),
    Case(name="deepseek_v3_tokens", run=_call(65536, 256, 8, True, "sigmoid", 2.5, 8, 4, _BIAS)),
    Case(name="most_experts", run=_call(65536, 512, 16, False, dtype=torch.float16)),
]
