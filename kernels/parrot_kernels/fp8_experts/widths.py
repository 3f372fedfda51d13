"""Widths that products of float8 take."""

from __future__ import annotations

from torch import Tensor

_WIDTH = 16  # bytes that rows must be multiples of


def why_not_widths(args: tuple[object, ...]) -> str | None:
    """None when all widths of x and the weights, the first of the arguments of an op, fit; else the reason."""
    matrices = [arg for arg in args[:3] if isinstance(arg, Tensor) and arg.dim() >= 3]
    for matrix in matrices:
        # Sums run over the last width of x, and over one or the other of weights.
        for width in matrix.shape[-1:] if matrix is matrices[0] else matrix.shape[-2:]:
            if width % _WIDTH:
                return f"each width must be a multiple of {_WIDTH}, got {width}"
    return None
