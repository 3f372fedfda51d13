"""Reports of a run on its steps, record by record; the part since the last record goes on after a restart."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from parrot_sys.training.metrics import StepMetrics, peak_flops
from parrot_sys.training.routes import RouteWatch, gather_routes
from parrot_sys.training.step import StepResult

logger = logging.getLogger(__name__)


class StepLog:
    """Adds up steps until a record is due; its state belongs into checkpoints.

    With it a resumed run writes the records of an undisturbed one: times aside, nothing in them depends on where a run
    was interrupted.
    """

    def __init__(self, num_experts: int, device: torch.device, languages: Sequence[str]) -> None:
        self._num_experts, self._device, self._languages = num_experts, device, languages
        self.last: dict[str, Any] = {}
        """The last record with a step that was not left out; of one before a restart its loss and labels."""
        self.rows = 0.0
        """Rows of all steps of this process."""
        self._watch = RouteWatch()
        self._begin()

    def _begin(self) -> None:
        self._window = StepMetrics(self._num_experts, self._device, languages=self._languages)
        self._skipped, self._before, self._since = 0, 0.0, time.perf_counter()

    def restart_clock(self) -> None:
        """Steps begin now; what came before is no time of theirs."""
        self._since = time.perf_counter()

    def add(self, result: StepResult) -> None:
        """Takes in a step."""
        if result.skipped:
            self._skipped += 1
        else:
            self._window.merge(result.metrics)
            self.rows += result.metrics.scalar("rows")

    def take(self, grad_norm: float, **values: Any) -> dict[str, Any]:
        """The record of all steps since the last one, with `values`; the next one begins."""
        window, seconds = self._window, self._before + time.perf_counter() - self._since
        routes = gather_routes(window.routes)
        record: dict[str, Any] = window.record(routes) if window.steps else {"rows": 0}
        if self._skipped:
            record["skipped_steps"] = self._skipped
        record |= {"grad_norm": grad_norm if math.isfinite(grad_norm) else None, **values}
        record |= {"seconds": seconds, "tokens_per_second": record["rows"] / seconds}
        if (peak := peak_flops(self._device)) is not None:
            record["mfu"] = window.scalar("flops") / (seconds * peak * dist.get_world_size())
        if window.steps:
            self.last = record
            for warning in self._watch.judge(routes):  # the same on all ranks
                if dist.get_rank() == 0:
                    logger.warning(warning)
        self._begin()
        return record

    def measured(self) -> dict[str, Any]:
        """Loss and labels of the last record; before the first, of the steps so far."""
        record = self.last or (self._window.record() if self._window.steps else {})
        return {name: record.get(name) for name in ("loss", "labels")}

    def state_dict(self) -> dict[str, Any]:
        """Plain values for `load_state_dict`."""
        elapsed = self._before + time.perf_counter() - self._since
        return {
            "window": self._window.state_dict(),
            "skipped": self._skipped,
            "seconds": elapsed,
            "watch": self._watch.state_dict(),
            "last": {name: self.last[name] for name in ("loss", "labels") if name in self.last},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with the steps that the checkpoint has no record of."""
        self._window.load_state_dict(state["window"])
        self._skipped, self._before = state["skipped"], state["seconds"]
        self.last = dict(state["last"])
        if "watch" in state:  # earlier versions saved none
            self._watch.load_state_dict(state["watch"])
