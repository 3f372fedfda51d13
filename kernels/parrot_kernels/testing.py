"""What op tests and benchmarks share: the tolerance rule, poisoned memory, and input makers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor


def max_error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference, in float64; infinite when `actual` has a NaN that `exact` has not."""
    if actual.shape != exact.shape:
        raise AssertionError(f"shape must be {list(exact.shape)}, got {list(actual.shape)}")
    if not actual.numel():
        return 0.0
    same = actual.double() == exact  # equal infinities have the difference NaN
    difference = (actual.double() - exact).abs().masked_fill(same, 0.0)
    return float(difference.nan_to_num(nan=float("inf"), posinf=float("inf")).max())


def assert_accurate(name: str, actual: Tensor, exact: Tensor, same_dtype: Tensor) -> None:
    """The error of `actual` is at most twice that of the same-dtype PyTorch expression + 4 eps max|exact|.

    Args:
        name: what is compared, for the message.
        actual: the result under test.
        exact: the same result from float64 arithmetic.
        same_dtype: the same result from plain PyTorch in the dtype under test; its dtype gives eps.
    """
    finite = exact[exact.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    own, allowed = max_error(actual, exact), max_error(same_dtype, exact)
    bound = 2 * allowed + 4 * torch.finfo(same_dtype.dtype).eps * scale
    if not own <= bound:
        raise AssertionError(
            f"{name}: error {own:.3e} exceeds {bound:.3e} "
            f"(PyTorch in {same_dtype.dtype}: {allowed:.3e}, largest value {scale:.3e})"
        )


def assert_all_accurate(
    actual: Mapping[str, Tensor], exact: Mapping[str, Tensor], same_dtype: Mapping[str, Tensor]
) -> None:
    """`assert_accurate` for each name; all three must have the same names."""
    if not actual.keys() == exact.keys() == same_dtype.keys():
        raise AssertionError(f"names differ: {sorted(actual)}, {sorted(exact)}, {sorted(same_dtype)}")
    for name, value in actual.items():
        assert_accurate(name, value, exact[name], same_dtype[name])


def worst_of(exact: Mapping[str, Tensor], *results: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For each name the result that is furthest from `exact`.

    A result of few elements says little of the error of PyTorch's own sums: they are made in several orders.
    """
    return {name: max((own[name] for own in results), key=partial(max_error, exact=exact[name])) for name in exact}


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, every uninitialised tensor that torch allocates is full of NaN (integers: the largest value)."""
    was, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEShape:
    """Sizes of one text-guided MoE call."""

    images: int
    rows: int  # V
    hidden: int  # H
    experts: int  # E
    ffn: int  # I
    topk: int = 1


def make_expert_inputs(shape: MoEShape, dtype: torch.dtype = torch.float64, device: str = "cpu") -> dict[str, Tensor]:
    """x, w_gate_up, w_down and logits, scaled so that outputs are of order one."""

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(sizes, dtype=torch.float64) * scale).to(device, dtype)

    return {
        "x": normal(shape.images, shape.rows, shape.hidden),
        "w_gate_up": normal(shape.experts, 2, shape.ffn, shape.hidden, scale=shape.hidden**-0.5),
        "w_down": normal(shape.experts, shape.ffn, shape.hidden, scale=shape.ffn**-0.5),
        "logits": normal(shape.images, shape.experts),
    }


def make_spans(lengths: list[int], images_per_sample: list[int]) -> tuple[Tensor, Tensor]:
    """text_start and text_end [S] of images whose samples' texts stand one after the other."""
    ends = torch.tensor(lengths).cumsum(0)
    repeats = torch.tensor(images_per_sample)
    start, end = ends - torch.tensor(lengths), ends
    return start.repeat_interleave(repeats).int(), end.repeat_interleave(repeats).int()


def outputs_and_gradients(
    function: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype,
    *,
    gradients: bool = True,
) -> dict[str, Tensor]:
    """Outputs of `function` at `inputs` in `dtype`, and the gradient of each input as `grad_<name>`.

    Incoming gradients are the same random numbers on each call; outputs that are infinite get none. Without
    `gradients` the outputs alone, of functions that have none.
    """
    leaves = {name: value.detach().to(dtype, copy=True).requires_grad_(gradients) for name, value in inputs.items()}
    outputs = function(leaves)
    if not gradients:
        return outputs
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out) for out in outputs.values()]
    finite = [out.isfinite() for out in outputs.values()]
    torch.autograd.backward(
        [out[mask] for out, mask in zip(outputs.values(), finite, strict=True)],
        [grad[mask] for grad, mask in zip(grads, finite, strict=True)],
    )
    results = {name: out.detach() for name, out in outputs.items()}
    for name, leaf in leaves.items():
        assert leaf.grad is not None, f"{name} got no gradient"
        results[f"grad_{name}"] = leaf.grad
    return results
