"""Prints which kernels the launchers of the Triton back ends would compile, call by call; compiles and runs nothing.

Run as a program without TRITON_INTERPRET: launches get meta tensors, and a driver that stands in for CUDA's. A launcher
that times a kernel, or asks a tensor for a value, ends with an error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver

from parrot_kernels import compile_only
from parrot_kernels.expert_mlp import triton_impl as expert_mlp
from parrot_kernels.grouped_gemm import triton_impl as grouped_gemm
from parrot_kernels.linear_cross_entropy import triton_impl as linear_cross_entropy
from parrot_kernels.paged_attention import triton_impl as paged_attention
from parrot_kernels.router_attention import triton_impl as router_attention
from parrot_kernels.segment_attention import triton_impl as segment_attention
from parrot_kernels.text_guided_routing import triton_impl as text_guided_routing

# What stays the same from step to step: the sizes of a model. What changes is the argument of each call.
ROWS, HIDDEN, FFN, EXPERTS, TOPK, HEADS, WIDTH = 577, 512, 768, 6, 2, 8, 64


def meta(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


def integers(*sizes: int) -> Tensor:
    return meta(*sizes, dtype=torch.int32)


def experts(form: str, rows: int) -> Callable[[int], None]:
    def call(images: int) -> None:
        x = meta(images, rows, HIDDEN)
        args: tuple[Tensor, ...] = (x, meta(EXPERTS, 2, FFN, HIDDEN), meta(EXPERTS, FFN, HIDDEN))
        args += (meta(images, EXPERTS, dtype=torch.float32),)
        if form == "topk":
            longs = meta(images, TOPK, dtype=torch.int64), meta(images * TOPK, dtype=torch.int64)
            args += (longs[0], integers(EXPERTS + 1), longs[1])
        _, z = getattr(expert_mlp, f"expert_mlp_{form}_fwd")(*args, (0.1, 1.0), True)
        getattr(expert_mlp, f"expert_mlp_{form}_bwd")(x, *args, z, (0.1, 1.0), (True,) * 4)

    return call


def grouped(tokens: int) -> None:
    x, w, offsets = meta(tokens, 1, HIDDEN), meta(EXPERTS, 2, FFN, HIDDEN), integers(EXPERTS + 1)
    plan, weights = meta(tokens * TOPK, dtype=torch.int64), meta(tokens * TOPK, dtype=torch.float32)
    h, _ = grouped_gemm.m_grouped_swiglu(x, w, offsets, plan, TOPK, weights, True)
    grouped_gemm.m_grouped_gemm(h, w[:, 0], offsets, None, 1, False)
    grouped_gemm.k_grouped_gemm(h, x, offsets, plan, TOPK)


def cross_entropy(rows: int) -> None:
    args = meta(rows, HIDDEN), meta(5000, HIDDEN), meta(rows, dtype=torch.int64)
    lse, target_logits = linear_cross_entropy.linear_cross_entropy_fwd(*args, 0)
    linear_cross_entropy.linear_cross_entropy_bwd(lse, target_logits, *args, lse, 0, (True, True))


def attention_of_samples(rows: int) -> None:
    query, key, value = meta(rows, HEADS, WIDTH), meta(rows, HEADS, WIDTH), meta(rows, HEADS, WIDTH)
    inputs = (query, key, value, meta(rows, 2), integers(5), integers(5), None)
    out, extra, lse = router_attention.router_attention_fwd(*inputs, rows, rows, 0.1)
    results = out, extra, lse, rows, rows, 0.1
    router_attention.router_attention_bwd(out, extra, None, *inputs, *results, (True,) * 4)


def attention_of_segments(rows: int) -> None:
    query, key, value = meta(rows, HEADS, WIDTH), meta(rows + 3, HEADS, WIDTH), meta(rows + 3, HEADS, WIDTH)
    inputs = (query, key, value, integers(rows), integers(rows))
    out, lse = segment_attention.segment_attention_fwd(*inputs, 0.1)
    segment_attention.segment_attention_bwd(out, None, *inputs, out, lse, 0.1, (True,) * 3)


def attention_to_cache(rows: int) -> None:
    requests = integers(rows, rows), integers(rows + 1), integers(rows)
    cache = meta(100, HEADS // 2, 16, WIDTH)
    paged_attention.paged_attention(meta(rows, HEADS, WIDTH), cache, cache, *requests, None, None, 1 + rows % 3, 0.1)


def routing(images: int) -> None:
    spans = integers(images), integers(images)
    args = (meta(images, HIDDEN), meta(images * 300, HIDDEN), *spans, meta(EXPERTS, HIDDEN))
    logits, lse = text_guided_routing.text_guided_routing_fwd(*args, 0.1)
    text_guided_routing.text_guided_routing_bwd(logits, None, *args, logits, lse, 0.1, (True,) * 3)


CALLS: dict[str, Callable[[int], None]] = {
    "expert_mlp dense": experts("dense", ROWS),
    "expert_mlp topk": experts("topk", ROWS),
    "expert_mlp tokens": experts("topk", 1),
    "grouped_gemm": grouped,
    "linear_cross_entropy": cross_entropy,
    "paged_attention": attention_to_cache,
    "router_attention": attention_of_samples,
    "segment_attention": attention_of_segments,
    "text_guided_routing": routing,
}


def kernels_of(call: Callable[[int], None], number: int) -> list[str]:
    """Kernels, dtypes and sizes of every compilation that a call asks for."""
    found: set[str] = set()

    def before(*, key: Any, fn: Any, **_: object) -> bool:
        found.add(f"{fn.jit_function.__name__} {key}")
        return True  # not compiled

    knobs.runtime.jit_cache_hook = before
    call(number)
    return sorted(found)


def lines(names: list[str], numbers: list[int]) -> Iterator[str]:
    for name in names:
        for number in numbers:
            yield json.dumps({"name": name, "number": number, "kernels": kernels_of(CALLS[name], number)})


if __name__ == "__main__":
    driver.set_active(compile_only.CompileOnlyDriver(90))
    for line in lines(list(CALLS), [int(number) for number in sys.argv[1:]]):
        print(line, flush=True)
