"""Plans of launches are kept by sizes: what is launched must not depend on which calls came before."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from parrot_kernels import triton_support
from parrot_kernels.expert_mlp import kernels as route_kernels
from parrot_kernels.expert_mlp import triton_impl as experts
from parrot_kernels.grouped_gemm import tiles
from parrot_kernels.grouped_gemm import triton_impl as grouped
from parrot_kernels.launches import Launch
from parrot_kernels.text_guided_routing import triton_impl as routing
from parrot_kernels.topk_routing import triton_impl as choice

MODULES: tuple[ModuleType, ...] = (experts, route_kernels, grouped, routing, choice)
BASE: dict[str, Any] = {
    "dtype": torch.bfloat16,
    "images": 3,
    "rows": 80,
    "hidden": 32,
    "ffn": 48,
    "experts": 4,
    "topk": 2,
    "texts": 6,
    "residual_scale": 0.5,
    "output_scale": 2.0,
    "offset": 0,
    "stride": 1,
    "processors": 4,
    "tma": True,
    "needs": True,
    "score_function": "softmax",
}
OTHERS = {
    "dtype": torch.float32,
    "images": 5,
    "rows": 2,
    "hidden": 48,
    "ffn": 36,
    "experts": 5,
    "topk": 1,
    "texts": 400,
    "residual_scale": 1,
    "output_scale": 1,
    "offset": 1,
    "stride": 2,
    "processors": 132,
    "tma": False,
    "needs": False,
    "score_function": "sigmoid",
}


def call_all(of: dict[str, Any], device: torch.device) -> None:
    """Each planned launcher, both passes."""
    dtype, n, v, h, i, e, k = (of[name] for name in ("dtype", "images", "rows", "hidden", "ffn", "experts", "topk"))

    def tensor(*sizes: int) -> Tensor:
        count = torch.Size(sizes).numel()
        return torch.zeros(of["offset"] + count, dtype=dtype, device=device)[of["offset"] :].view(sizes)

    def longs(*sizes: int) -> Tensor:
        return torch.zeros(sizes, dtype=torch.int64, device=device)

    x, gate_up, down = tensor(n, v, h), tensor(e, 2, i, h), tensor(e, i, h)
    probs, scales = torch.zeros(n, e, device=device), (of["residual_scale"], of["output_scale"])
    forms: list[tuple[str, tuple[Tensor, ...]]] = [
        ("dense", (x, gate_up, down, probs)),
        ("topk", (x, gate_up, down, probs, longs(n, k), longs(e + 1).int(), longs(n * k))),
    ]
    for form, args in forms:
        _, z = getattr(experts, f"expert_mlp_{form}_fwd")(*args, scales, True)
        getattr(experts, f"expert_mlp_{form}_bwd")(x, *args, z, scales, (True,) * 4)
    grouped.m_grouped_gemm(x.view(n, v, h), gate_up[:, 0].contiguous(), longs(e + 1), None, 1, True)
    text = tensor(of["texts"] * of["stride"], h)[:: of["stride"]]
    router = (x[:, 0], text, longs(n), longs(n), tensor(e, h))
    logits, lse = routing.text_guided_routing_fwd(*router, of["residual_scale"])
    needs = (of["needs"], True, True)
    routing.text_guided_routing_bwd(logits, None, *router, logits, lse, of["residual_scale"], needs)
    for repeats in (1, 2000):  # for one program, and for many
        rows = logits.repeat(repeats, 1)
        indices = choice.topk_routing_fwd(rows, k, of["needs"], of["score_function"], of["output_scale"])[5]
        options = of["needs"], of["score_function"], of["output_scale"]
        choice.topk_routing_bwd(rows, None, None, None, None, rows, indices, *options)


def forget() -> None:
    """Makes the next launch of each kernel plan anew."""
    for module in MODULES:
        for value in vars(module).values():
            if hasattr(value, "cache_clear") and hasattr(value, "cache_parameters"):
                value.cache_clear()


@pytest.fixture
def launches_of(monkeypatch: pytest.MonkeyPatch, triton_device: torch.device) -> Callable[[dict[str, Any]], list[Any]]:
    """What a call would launch: kernel, grid, numbers with their types, and constants."""
    seen: list[Any] = []

    def note(self: Launch, *tensors: Tensor | None) -> None:
        numbers = [(type(number), number) for number in self.numbers]
        options = sorted((name, type(value), value) for name, value in self.options.items())
        seen.append((self.kernel.fn.__name__, self.grid, numbers, options))

    monkeypatch.setattr(Launch, "__call__", note)
    read = tiles.tma_reads

    def launches(of: dict[str, Any]) -> list[Any]:
        monkeypatch.setattr(triton_support, "num_processors", lambda device: of["processors"])
        monkeypatch.setattr(tiles, "tma_reads", lambda *matrices: of["tma"] and read(*matrices))
        seen.clear()
        call_all(of, triton_device)
        return seen[:]

    return launches


def test_nothing_depends_on_earlier_calls(launches_of) -> None:
    calls = [BASE, *({**BASE, name: value} for name, value in OTHERS.items())]
    wanted = []
    for of in calls:
        forget()
        wanted.append(launches_of(of))
    forget()
    for kept, (of, own) in itertools.product((False, True), zip(calls, wanted, strict=True)):
        assert launches_of(of) == own, f"{of}, plans kept: {kept}"
    # Each of these changes reaches a launch.
    for of, own in zip(calls[1:], wanted[1:], strict=True):
        assert own != wanted[0], of


def test_a_kept_plan_is_taken_again(launches_of) -> None:
    forget()
    launches_of(BASE)
    planners = [
        value for module in MODULES for name, value in vars(module).items() if name.endswith(("_launch", "_plan"))
    ]
    before = [planner.cache_info().misses for planner in planners]
    launches_of(BASE)
    assert [planner.cache_info().misses for planner in planners] == before
    assert len(planners) == 9
    assert all(before)
