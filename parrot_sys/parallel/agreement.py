"""Results of one rank's work, told to all: a failure on one rank must not leave the others in a collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def on_first_rank(action: Callable[[], T]) -> T:
    """Runs `action` on rank 0 and gives every rank its result, or raises its error on every rank.

    Args:
        action: its result and its errors must pickle.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except Exception as error:  # raised below, on every rank
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gather_everywhere(value: T) -> list[T]:
    """The values of all ranks, by rank, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
