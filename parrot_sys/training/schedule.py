"""Length of a run, and its learning rate: linear warm-up, then half a cosine (Loshchilov and Hutter, 2017)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from parrot_sys.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLength:
    """Progress and end of a run, by the samples that it has consumed.

    Positions are in steps of the batch size that the run began with, so that another batch size later on moves neither
    the end of the run nor its learning rates. With the same batch size positions are the numbers of the steps.
    """

    samples_per_epoch: int
    batch_size: int
    """Samples of a step when the run began."""
    total_steps: int
    """Steps of the whole run at that batch size."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch at that batch size, the last of which may be smaller."""
        return -(-self.samples_per_epoch // self.batch_size)

    @classmethod
    def of(cls, samples_per_epoch: int, batch_size: int, *, epochs: float, max_steps: int | None) -> RunLength:
        """From the settings of a run: `max_steps` where set, else `epochs`."""
        steps = max_steps or max(1, round(epochs * -(-samples_per_epoch // batch_size)))
        return cls(samples_per_epoch=samples_per_epoch, batch_size=batch_size, total_steps=steps)

    def changes(self, total_steps: int, batch_size: int) -> list[str]:
        """Changes that a resumed run has to be told.

        Args:
            total_steps: length of the run when the checkpoint was saved.
            batch_size: that it goes on with.
        """
        texts = []
        if total_steps != self.total_steps:
            now = f"the run had {total_steps} steps and now has {self.total_steps}"
            texts.append(f"{now}: the learning rate differs from here on")
        if batch_size != self.batch_size:
            texts.append(
                f"the run began with global_batch_size {self.batch_size} and goes on with {batch_size}: in samples its "
                f"end, warm-up and learning rates stay (max_steps and warmup_steps count steps of {self.batch_size})"
            )
        return texts

    def position(self, epoch: int, samples: int) -> float:
        """Place in the run after `epoch` whole epochs and `samples` samples of the next one."""
        return epoch * self.steps_per_epoch + samples / self.batch_size

    def steps_left(self, epoch: int, samples: int, batch_size: int) -> int:
        """Steps of `batch_size` samples from there to the end of the run."""
        steps = 0
        while self.position(epoch, samples) < self.total_steps:
            to_end = (self.total_steps - epoch * self.steps_per_epoch) * self.batch_size - samples
            in_epoch = min(to_end, self.samples_per_epoch - samples)
            steps += -(-in_epoch // batch_size)
            if in_epoch == to_end:
                break
            epoch, samples = epoch + 1, 0
        return steps


@dataclass(frozen=True, slots=True)
class CosineSchedule:
    """Multiplier of the way from `min_lr` to `max_lr` for each place in a run (see `RunLength.position`).

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

    def factor(self, step: float) -> float:
        """In [0, 1]; `step` counts from 0 and may lie between two steps."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        progress = (min(step, self.total_steps) - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return 0.5 * (1.0 + math.cos(math.pi * progress))

    def lr(self, step: float, max_lr: float, min_lr: float) -> float:
        """Learning rate of `step`: warm-up rises from near zero, the cosine ends at `min_lr`."""
        factor = self.factor(step)
        return max_lr * factor if step < self.warmup_steps else min_lr + (max_lr - min_lr) * factor

    def apply(self, step: float, param_groups: Iterable[dict[str, Any]]) -> None:
        """Sets `lr` of each parameter group from its own `max_lr` and `min_lr`."""
        for group in param_groups:
            group["lr"] = self.lr(step, group["max_lr"], group["min_lr"])


def warmup_steps(total_steps: int, fraction: float, steps: int | None) -> int:
    """`steps` where set, else the fraction rounded up (as the Hugging Face trainer) with at least one step after it."""
    wanted = math.ceil(total_steps * fraction) if steps is None else steps
    return min(wanted, total_steps - 1) if steps is None else wanted
