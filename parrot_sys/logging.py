"""Log set-up that knows ranks: one line per message instead of one per process."""

from __future__ import annotations

import logging
import sys
from typing import Literal, TextIO

from tqdm import tqdm

from parrot_sys import platform
from parrot_sys.errors import printable

Level = Literal["DEBUG", "INFO", "WARNING", "ERROR"]


def setup_logging(
    level: Level = "INFO", *, all_ranks: bool = False, stream: TextIO | None = None, own_program: bool = True
) -> None:
    """Sets up the logger `parrot_sys` (and with it every `logging.getLogger(__name__)` of the package).

    Rank 0 logs from `level` on; other ranks only warnings and errors, marked with their rank. Calling it again replaces
    the earlier set-up.

    Args:
        level: the lowest level that is shown.
        all_ranks: every rank logs from `level` on.
        stream: where to write; stderr when not given.
        own_program: the program is one of this package. False leaves the loggers of others as they are.
    """
    launch = platform.launch()
    quiet = launch.rank > 0 and not all_ranks
    handler = _ProgressHandler(stream or sys.stderr)
    rank = f"[rank {launch.rank}] " if launch.world_size > 1 and (launch.rank > 0 or all_ranks) else ""
    handler.setFormatter(_PrintableFormatter(f"%(asctime)s {rank}%(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
    handler.setLevel(max(logging.WARNING, logging.getLevelName(level)) if quiet else level)
    logger = logging.getLogger("parrot_sys")
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False
    if own_program:
        # Advice to take another class than GPTModel, of which Megatron-Core 0.16 has none.
        logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)


class _PrintableFormatter(logging.Formatter):
    """Escapes control characters: names and texts from other people's files must not steer a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n\t")


class _ProgressHandler(logging.StreamHandler[TextIO]):
    """Writes above a running progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=self.stream)
            self.flush()
        except Exception:  # the contract of logging.Handler: a broken stream must not end the program
            self.handleError(record)
