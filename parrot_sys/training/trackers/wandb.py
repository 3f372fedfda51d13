"""Weights & Biases. WANDB_MODE=offline writes to OUTPUT/wandb alone; `wandb sync` sends that later."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from parrot_sys.training.trackers.base import CaptionedImage, Number, RunFacts
from parrot_sys.training.trackers.identity import run_identity


class WandbTracker:
    """A run of Weights & Biases; one that goes on after an interruption keeps its identity there."""

    def __init__(self, run: RunFacts) -> None:
        import wandb  # optional, so only where it is asked for

        identity = run_identity(run.output, "wandb", lambda: secrets.token_hex(4))
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=identity,
            resume="allow",
            dir=str(run.output),
            config={**run.config, "environment": dict(run.environment)},
            allow_val_change=True,
        )
        # Steps that are done again after an interruption would be dropped by wandb's own count of steps.
        self._run.define_metric("*", step_metric="step")

    def write_numbers(self, step: int, numbers: Sequence[Number]) -> None:
        """Metrics over `step`."""
        self._run.log({"step": step, **{number.name: number.value for number in numbers}})

    def write_images(self, step: int, name: str, images: Sequence[CaptionedImage]) -> None:
        """A list of images with captions."""
        from wandb import Image

        self._run.log({"step": step, name: [Image(each.image, caption=each.caption) for each in images]})

    def close(self, *, failed: bool = False) -> None:
        """Sends or writes what is left."""
        self._run.finish(exit_code=int(failed))
