"""`few_rows_linear`: a linear layer on a few rows with its norm, activation, bias and residual; for inference."""

from __future__ import annotations

from torch import Tensor

from parrot_sys.ops import registry
from parrot_sys.ops._operator import operator

# M rows, K inputs, N outputs
_FEW_ROWS = 32


def takes_few_rows(x: Tensor) -> bool:
    """Whether the C++ loops would multiply these rows; where they do not, layers go on as without the op."""
    return x.is_cpu and len(x) <= _FEW_ROWS and registry.runs_on("few_rows_linear", "cpu", x)


@operator("few_rows_linear")
def _fwd(
    x: Tensor,
    weight: Tensor,
    norm: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    gated: bool,
    eps: float,
) -> Tensor:
    args = (x, weight, norm, bias, residual, gated, eps)
    out: Tensor = registry.select("few_rows_linear", *args).few_rows_linear(*args)
    return out


@_fwd.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    norm: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    gated: bool,
    eps: float,
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def few_rows_linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    eps: float = 0.0,
) -> Tensor:
    """`f(x) @ weight.T + bias + residual` for the rows of a step of answers, without gradients.

    It reads the weights as they are, without packing them: it is made for some 32 rows at most.

    Args:
        x: [M, K]; with `gated` [M, 2 K].
        weight: [N, K], dtype of `x`.
        norm: [K], weight of an RMS norm of `x`.
        bias: [N].
        residual: [M, N].
        gated: `x` holds gate and up, and silu(gate) * up is multiplied.
        eps: of the norm.

    Returns:
        [M, N], dtype of `x`, rounded once.

    Raises:
        ValueError: shapes do not fit, or there are a norm and gates.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != (1 + gated) * weight.shape[1]:
        raise ValueError(
            f"x must have shape [rows, {'2 ' if gated else ''}inputs] and weight [outputs, inputs], got "
            f"{list(x.shape)} and {list(weight.shape)}"
        )
    if gated and norm is not None:
        raise ValueError("a norm and gates do not go together: give one of them")
    out: Tensor = _fwd(x, weight, norm, bias, residual, gated, eps)
    return out
