"""Weights that are NaN or infinite: counted while they are loaded, named, and refused unless they are allowed."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from torch import Tensor

from parrot_sys.errors import CheckpointError

logger = logging.getLogger(__name__)

_CHUNK = 2**20
"""Values looked at together, so that the marks of a large tensor take little memory."""
_SHOWN = 10


class NonFinite:
    """Counts of values that are no finite numbers, by tensor."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def look(self, name: str, tensor: Tensor) -> None:
        """Counts those of a tensor, or of a part of it."""
        if not tensor.is_floating_point():
            return
        for part in tensor.detach().flatten().split(_CHUNK):
            if part.numel() and not all(bound.isfinite() for bound in part.aminmax()):  # (NaN is both bounds)
                self.counts[name] = self.counts.get(name, 0) + int((~part.isfinite()).sum())

    def merge(self, counts: Iterable[Mapping[str, int]]) -> None:
        """Takes the counts of all ranks; several that hold the same tensor, or parts of it, tell the largest."""
        for each in counts:
            for name, count in each.items():
                self.counts[name] = max(count, self.counts.get(name, 0))

    def refuse(self, where: object, *, allow: bool = False) -> None:
        """
        Raises:
            CheckpointError: there are some, and they are not allowed; allowed ones are a warning.
        """
        if not self.counts:
            return
        named = [f"{name} ({count})" for name, count in sorted(self.counts.items())[:_SHOWN]]
        more = f" and {len(self.counts) - _SHOWN} more" if len(self.counts) > _SHOWN else ""
        found = f"{where} holds NaN or infinite weights in {len(self.counts)} tensors: {', '.join(named)}{more}"
        if not allow:
            raise CheckpointError(
                f"{found}; a model with them computes nothing useful: take an intact copy, another dtype where theirs "
                "is too narrow, or set allow_non_finite to load them all the same"
            )
        logger.warning("%s", found)
