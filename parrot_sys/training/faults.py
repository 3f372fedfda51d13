"""Steps that go wrong, found before they update anything: a loss or gradient that is no number, a spike, no labels."""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from parrot_sys.errors import ParrotError
from parrot_sys.training.config import FaultConfig
from parrot_sys.training.writer import cut_records

logger = logging.getLogger(__name__)

BAD_STEPS_FILE = "bad_steps.jsonl"
"""Below the output of a run: one line for each step that was left out or ended the run, with its record ids."""

Reason = Literal["loss spike", "gradient is no number", "loss is no number", "no labels"]
_REASONS: tuple[Reason, ...] = ("loss spike", "gradient is no number", "loss is no number")


class TrainingError(ParrotError, ArithmeticError):
    """Training cannot go on: a loss or gradient is no number or spikes, or there is nothing to learn from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BadStep:
    """Why a step must not update anything; equal on all ranks."""

    step: int
    reason: Reason
    message: str
    loss: float | None
    grad_norm: float | None = None
    median: float | None = None


class StepGuard:
    """Judges steps before they update the parameters; all ranks come to the same verdict.

    Its state belongs into checkpoints: a resumed run must leave out what an undisturbed one leaves out.
    """

    def __init__(
        self, config: FaultConfig | None = None, output: str | Path | None = None, *, start_step: int = 0
    ) -> None:
        """
        Args:
            config: what counts as wrong and what to do then.
            output: directory of `bad_steps.jsonl`; none is written without it.
            start_step: steps done before; what an interrupted run wrote after it is taken back.
        """
        self.config = config or FaultConfig()
        self._losses: deque[float] = deque(maxlen=self.config.spike_window)
        self._skipped = 0  # one after the other
        self._path = Path(output) / BAD_STEPS_FILE if output is not None and dist.get_rank() == 0 else None
        if self._path is not None:
            cut_records(self._path, start_step)

    def state_dict(self) -> dict[str, Any]:
        """Plain values for `load_state_dict`."""
        return {"losses": list(self._losses), "skipped": self._skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with the losses of the checkpoint."""
        self._losses.extend(state["losses"])
        self._skipped = state["skipped"]

    def judge(self, step: int, loss: float, grad_norm: float, device: torch.device) -> BadStep | None:
        """Judges what is wrong with a step whose loss is a number; every rank calls it.

        Args:
            step: its number, from 1.
            loss: mean over the global batch.
            grad_norm: norm of all gradients, nothing of which has been used yet.
            device: of the ranks' collectives.
        """
        median = self._median()
        factor = self.config.spike_factor
        found: Reason | None = None
        if not math.isfinite(grad_norm):
            found = "gradient is no number"
        elif median is not None and factor is not None and loss > factor * median:
            found = "loss spike"
        # Ranks that disagreed would have other parameters from here on.
        verdict = torch.tensor([0 if found is None else 1 + _REASONS.index(found)], device=device)
        dist.all_reduce(verdict, op=dist.ReduceOp.MAX)
        if not (code := int(verdict.item())):
            self._losses.append(loss)
            self._skipped = 0
            return None
        reason = _REASONS[code - 1]
        message = (
            f"the loss {loss:.4g} is above faults.spike_factor={factor} times {median:.4g}, the median of the last "
            f"{len(self._losses)} steps"
            if reason == "loss spike"
            else f"the gradient norm is {grad_norm} although the loss is {loss:.4g}"
        )
        return BadStep(step=step, reason=reason, message=message, loss=loss, grad_norm=grad_norm, median=median)

    def handle(self, bad: BadStep, record_ids: Sequence[str], guilty: Sequence[str] = ()) -> None:
        """Writes the step down, and ends the run or lets it go on without it; every rank calls it.

        Args:
            bad: the step.
            record_ids: records of its global batch.
            guilty: those of them whose own loss is no number.

        Raises:
            TrainingError: the configuration says stop, or too many steps in a row were left out.
        """
        action = _action(self.config, bad.reason)
        self._skipped += 1
        too_many = action == "skip" and self._skipped > self.config.max_consecutive_skips
        stops = action == "stop" or too_many
        self._write(bad, "stop" if stops else "skip", record_ids, guilty)
        records = listed(guilty or record_ids)
        if not stops:
            if dist.get_rank() == 0:
                logger.warning("step %d is left out: %s; records: %s", bad.step, bad.message, records)
            return
        advice = "look at these records, lower optimizer.lr or use precision fp32"
        if bad.reason == "no labels":
            advice = "look at these records: their answers are empty, or model.max_seq_len cuts them off"
        if too_many:
            advice = (
                f"{self._skipped} steps in a row are more than faults.max_consecutive_skips="
                f"{self.config.max_consecutive_skips}: {advice}"
            )
        else:
            setting = "on_spike" if bad.reason == "loss spike" else "on_nonfinite"
            advice += f"; faults.{setting}=skip leaves such steps out"
        raise TrainingError(f"step {bad.step}: {bad.message}: {records}. The parameters were not updated; {advice}")

    def _median(self) -> float | None:
        """None while there are too few losses to say what is usual."""
        return statistics.median(self._losses) if 2 * len(self._losses) >= self.config.spike_window else None

    def _write(self, bad: BadStep, action: str, record_ids: Sequence[str], guilty: Sequence[str]) -> None:
        if self._path is None:
            return
        numbers = {"loss": bad.loss, "grad_norm": bad.grad_norm, "median": bad.median}
        record: dict[str, Any] = {"step": bad.step, "reason": bad.reason, "action": action}
        # JSON has no NaN.
        record |= {name: n if n is None or math.isfinite(n) else None for name, n in numbers.items()}
        record |= {"nonfinite_record_ids": list(guilty), "record_ids": list(record_ids)}
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            logger.error("%s could not be written (%s); the line was: %s", self._path, error, json.dumps(record))


def _action(config: FaultConfig, reason: Reason) -> Literal["stop", "skip"]:
    if reason == "no labels":
        return "skip"
    return config.on_spike if reason == "loss spike" else config.on_nonfinite


def listed(records: Sequence[str], limit: int = 20) -> str:
    """The first `limit` records in one line."""
    rest = f" and {len(records) - limit} more" if len(records) > limit else ""
    return (", ".join(records[:limit]) or "(without ids)") + rest
