"""`train/train.py` with faults: FAULTS is JSON, a list of {restart, rank, step, kind} that this process looks up."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from parrot_sys.cli import run_main
from parrot_sys.training.main import main


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _hang() -> None:
    while True:
        pass


def _install(kind: str, step: int) -> None:
    from parrot_sys.megatron.checkpoint import writer as checkpoint_writer
    from parrot_sys.training.trainer import Trainer

    write, batches = checkpoint_writer._write_bucket, Trainer._batches

    def half_written(bucket: Any, *rest: Any) -> Any:
        result = write(bucket, *rest)
        path = Path(bucket[0])
        if f"step-{step:08d}" in str(path):
            os.truncate(path, path.stat().st_size // 2)
            _die()
        return result

    def interrupted(self: Trainer) -> Iterator[Any]:
        for each in batches(self):
            if self.step + 1 == step:
                {"kill": _die, "hang": _hang}[kind]()
            yield each

    if kind == "kill while saving":
        checkpoint_writer._write_bucket = half_written
    else:
        Trainer._batches = interrupted


if __name__ == "__main__":
    here = {"restart": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), "rank": int(os.environ.get("RANK", 0))}
    for fault in json.loads(os.environ.get("FAULTS", "[]")):
        if {name: fault[name] for name in here} == here:
            _install(fault["kind"], fault["step"])
    code = run_main(main, sys.argv[1:], prog="train.py")
    if folder := os.environ.get("EXIT_CODES"):
        (Path(folder) / f"exit{here['rank']}").write_text(str(code))
    sys.exit(code)
