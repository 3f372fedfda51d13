"""`swiglu`: silu(gate) * up with one weight a row or segment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parrot_sys.ops import registry
from parrot_sys.ops._common import accumulate_dtype, or_none
from parrot_sys.ops._operator import operator

# J segments, V rows a segment, I inner width


@operator("swiglu")
def _fwd(z: Tensor, weights: Tensor | None) -> Tensor:
    return registry.select("swiglu", z, weights).swiglu_fwd(z, weights)


@_fwd.register_fake
def _(z: Tensor, weights: Tensor | None) -> Tensor:
    return z.new_empty(*z.shape[:2], z.shape[-1])


@operator("swiglu_bwd")
def _bwd(grad: Tensor, z: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    return registry.select("swiglu", z, weights).swiglu_bwd(grad.contiguous(), z, weights)


@_bwd.register_fake
def _(grad: Tensor, z: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z), z.new_empty(0 if weights is None else len(z), dtype=accumulate_dtype(z.dtype))


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    grad_z, grad_weights = _bwd(grad, *ctx.saved_tensors)
    return or_none(grad_z, ctx.needs_input_grad[0]), or_none(grad_weights, ctx.needs_input_grad[1])


_fwd.register_autograd(_backward, setup_context=_setup_context)


def swiglu(z: Tensor, weights: Tensor | None = None) -> Tensor:
    """`weights * silu(z[..., 0, :]) * z[..., 1, :]`.

    Args:
        z: [J, 2, I], or [J, V, 2, I] where V rows share one weight; gate first, up second.
        weights: [J] float32 (float64 for float64 `z`), the factor of each row or segment; None for ones.

    Returns:
        [J, I] or [J, V, I], dtype of `z`.

    Raises:
        ValueError: `z` or `weights` has another shape.
    """
    if z.dim() not in (3, 4) or z.shape[-2] != 2:
        raise ValueError(f"z must be [J, 2, I] or [J, V, 2, I], got {list(z.shape)}")
    if weights is not None and weights.shape != z.shape[:1]:
        raise ValueError(f"weights must be [{len(z)}], got {list(weights.shape)}")
    segments = (z.unsqueeze(1) if z.dim() == 3 else z).contiguous()
    h = _fwd(segments, None if weights is None else weights.contiguous())
    return h.squeeze(1) if z.dim() == 3 else h
