"""text_guided_routing in Triton beyond what it shares with the other back ends: launches, merging, ragged spans."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from parrot_kernels import triton_support
from parrot_kernels.testing import assert_accurate, make_spans
from parrot_kernels.text_guided_routing import reference, triton_impl

ALL = (True, True, True)
SCALE = 0.25


def make_args(lengths: list[int], images: list[int], device: torch.device, hidden: int = 16) -> tuple[Tensor, ...]:
    tensors = (
        torch.randn(sum(images), hidden),
        torch.randn(sum(lengths), hidden),
        *make_spans(lengths, images),
        torch.randn(6, hidden) * hidden**-0.5,
    )
    return tuple(tensor.to(device) for tensor in tensors)


def run(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Outputs and all gradients."""
    outputs = triton_impl.text_guided_routing_fwd(*args, SCALE)
    grads = (torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output) for output in outputs)
    return *outputs, *triton_impl.text_guided_routing_bwd(*grads, *args, *outputs, SCALE, ALL)


def expected(args: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    args = tuple(arg.to(dtype) if arg.is_floating_point() else arg for arg in args)
    outputs = reference.text_guided_routing_fwd(*args, SCALE)
    grads = (torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(dtype) for out in outputs)
    return *outputs, *reference.text_guided_routing_bwd(*grads, *args, *outputs, SCALE, ALL)


def assert_matches_float64(args: tuple[Tensor, ...]) -> None:
    names = ("logits", "lse", "grad_query", "grad_text", "grad_router_weight")
    for name, *results in zip(
        names, run(args), expected(args, torch.float64), expected(args, torch.float32), strict=True
    ):
        assert_accurate(name, *results)


def test_one_launch_forward_three_backward(watch_launches, triton_device: torch.device) -> None:
    launched = watch_launches(triton_impl)
    args = make_args([20, 9], [2, 1], triton_device)
    logits, lse = triton_impl.text_guided_routing_fwd(*args, SCALE)
    assert launched == ["fwd_kernel"]
    launched.clear()
    triton_impl.text_guided_routing_bwd(logits, None, *args, logits, lse, SCALE, ALL)
    assert launched == ["bwd_scores_kernel", "bwd_text_kernel", "bwd_images_kernel"]


@pytest.mark.parametrize(
    ("lengths", "images"),
    [
        ([40, 3, 70, 1], [20, 1, 18, 2]),  # more images of one sample than one tile takes; several blocks of text
        ([150, 200], [1, 2]),  # blocks of 64 rows
        ([2200], [1]),  # more blocks than one step of the merge takes
    ],
    ids=["many_images", "long_blocks", "many_blocks"],
)
def test_split_spans_match_float64(triton_device: torch.device, lengths: list[int], images: list[int]) -> None:
    assert_matches_float64(make_args(lengths, images, triton_device))


# (A GPU orders programs by itself; there the GPU suite runs each op twice and compares bits.)
@pytest.mark.skipif(not triton_support.INTERPRETING, reason="only the interpreter's order of programs can be changed")
def test_order_of_the_programs_changes_no_bit(monkeypatch: pytest.MonkeyPatch, triton_device: torch.device) -> None:
    args = make_args([90, 40], [3, 2], triton_device)
    forwards = run(args)
    set_grid_idx = InterpreterBuilder.set_grid_idx

    def reversed_order(self: InterpreterBuilder, x: int, y: int, z: int) -> None:
        last_x, last_y, _ = self.grid_dim
        set_grid_idx(self, last_x - 1 - x, last_y - 1 - y, z)

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", reversed_order)
    for one, other in zip(forwards, run(args), strict=True):
        assert torch.equal(one, other)


def test_counters_are_left_at_zero(monkeypatch: pytest.MonkeyPatch, triton_device: torch.device) -> None:
    """They are used again by the next launch in the stream, without being cleared."""
    counters = torch.zeros(64, dtype=torch.int32, device=triton_device)
    monkeypatch.setattr(triton_impl, "semaphores", lambda count, device: counters)
    args = make_args([40, 0, 21], [3, 1, 17], triton_device)
    first = run(args)
    assert not counters.any()
    for one, other in zip(first, run(args), strict=True):
        assert torch.equal(one, other)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_spans(triton_device: torch.device, data: st.DataObject) -> None:
    """Spans in any order that overlap, contain each other, leave rows out or are empty."""
    rows = data.draw(st.integers(1, 50))
    spans = data.draw(st.lists(st.tuples(st.integers(0, rows), st.integers(0, rows)), min_size=1, max_size=20))
    torch.manual_seed(0)
    query, text, _, _, router = make_args([rows], [len(spans)], triton_device)
    start, end = torch.tensor(spans, dtype=torch.int32, device=triton_device).unbind(1)
    assert_matches_float64((query, text, start, end, router))


def test_refuses_what_it_cannot_hold(triton_device: torch.device) -> None:
    query, text, start, end, _ = make_args([3], [1], triton_device)
    assert "64 experts" in str(triton_impl.why_not(query, text, start, end, torch.zeros(65, 16, device=triton_device)))
    assert "float64" in str(triton_impl.why_not(query.double()))
