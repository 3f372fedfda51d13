"""Learning rate over the steps of a run: linear warm-up, then half a cosine (Loshchilov and Hutter, 2017)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from parrot_sys.errors import ConfigError


@dataclass(frozen=True, slots=True)
class CosineSchedule:
    """Multiplier of the way from `min_lr` to `max_lr` for each step of a run.

    `warmup_steps` rising steps, the peak at step `warmup_steps`, then down to `min_lr` at `total_steps`. Against the
    Hugging Face trainer the warm-up is shifted, so that no step runs with a learning rate of zero.
    """

    total_steps: int
    warmup_steps: int

    def __post_init__(self) -> None:
        if self.total_steps < 1:
            raise ConfigError(f"a run must have at least one step, got {self.total_steps}")
        if not 0 <= self.warmup_steps < self.total_steps:
            raise ConfigError(
                f"optimizer.warmup_steps must be in [0, {self.total_steps}) for a run of {self.total_steps} steps, "
                f"got {self.warmup_steps}"
            )

    def factor(self, step: int) -> float:
        """In [0, 1]; `step` counts from 0."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        progress = (min(step, self.total_steps) - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return 0.5 * (1.0 + math.cos(math.pi * progress))

    def lr(self, step: int, max_lr: float, min_lr: float) -> float:
        """Learning rate of `step`: warm-up rises from near zero, the cosine ends at `min_lr`."""
        factor = self.factor(step)
        return max_lr * factor if step < self.warmup_steps else min_lr + (max_lr - min_lr) * factor

    def apply(self, step: int, param_groups: Iterable[dict[str, Any]]) -> None:
        """Sets `lr` of each parameter group from its own `max_lr` and `min_lr`."""
        for group in param_groups:
            group["lr"] = self.lr(step, group["max_lr"], group["min_lr"])


def warmup_steps(total_steps: int, fraction: float, steps: int | None) -> int:
    """`steps` where set, else the fraction rounded up (as the Hugging Face trainer) with at least one step after it."""
    wanted = math.ceil(total_steps * fraction) if steps is None else steps
    return min(wanted, total_steps - 1) if steps is None else wanted
