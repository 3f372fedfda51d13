"""Helpers for the host: those of the C++ module `_host`, or the same in Python where it was not built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from parrot_kernels import host_reference

__all__ = ["first_fit_decreasing", "why_not"]

if TYPE_CHECKING:
    from parrot_kernels.host_reference import first_fit_decreasing
else:
    try:
        from parrot_kernels._host import first_fit_decreasing
    except ImportError:
        first_fit_decreasing = host_reference.first_fit_decreasing


def why_not() -> str | None:
    """None where the C++ module is in use, else the reason."""
    if first_fit_decreasing is not host_reference.first_fit_decreasing:
        return None
    return "not built, as the C++ extension; Python does the same more slowly"
