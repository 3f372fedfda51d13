"""The trackers by name, and all of those that a run has."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Literal

from parrot_sys.errors import ConfigError
from parrot_sys.training.trackers.base import CaptionedImage, Number, RunFacts, Tracker

logger = logging.getLogger(__name__)

TrackerName = Literal["tensorboard", "wandb", "mlflow"]
_CLASSES: dict[TrackerName, str] = {
    "tensorboard": "TensorBoardTracker",
    "wandb": "WandbTracker",
    "mlflow": "MlflowTracker",
}
"""Name, which is that of the package and of the module here -> class."""


def check_installed(names: Sequence[TrackerName]) -> None:
    """Raise ConfigError for a tracker whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"logging.trackers names {name}, which is not installed: pip install 'parrot_sys[trackers]', "
                "or leave it out"
            )


class Trackers:
    """The trackers of a run. One that fails is named once and left out from then on; the run goes on."""

    def __init__(self, names: Sequence[TrackerName], facts: Callable[[], RunFacts]) -> None:
        """
        Args:
            names: of the trackers.
            facts: tells of the run; asked where there is a tracker.

        Raises:
            ConfigError: a tracker cannot start.
        """
        self._trackers: dict[TrackerName, Tracker] = {}
        run = facts() if names else None
        for name in names:
            try:
                module = importlib.import_module(f"parrot_sys.training.trackers.{name}")
                self._trackers[name] = getattr(module, _CLASSES[name])(run)
            except Exception as error:
                self.close(failed=True)
                raise ConfigError(
                    f"logging.trackers: {name} cannot start ({type(error).__name__}: {error}); "
                    "fix that, or leave it out"
                ) from error

    def __bool__(self) -> bool:
        return bool(self._trackers)

    def write_numbers(self, step: int, numbers: Sequence[Number]) -> None:
        """See `Tracker`."""
        self._each(lambda tracker: tracker.write_numbers(step, numbers))

    def write_images(self, step: int, name: str, images: Sequence[CaptionedImage]) -> None:
        """See `Tracker`."""
        self._each(lambda tracker: tracker.write_images(step, name, images))

    def close(self, *, failed: bool = False) -> None:
        """See `Tracker`."""
        self._each(lambda tracker: tracker.close(failed=failed))
        self._trackers.clear()

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                action(tracker)
            except Exception as error:  # of any kind: they are libraries of others, disks and networks
                del self._trackers[name]
                logger.error("nothing more is written to %s: %s: %s", name, type(error).__name__, error)
