"""Faults under `torchrun --max-restarts`: workers killed with -9 or hanging, SIGTERM to the launcher."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from parrot_sys.cli import save_config
from parrot_sys.training.checkpoint import latest_checkpoint
from parrot_sys.training.config import CheckpointConfig, FaultConfig, TrainConfig
from parrot_sys.training.watchdog import HUNG
from parrot_sys.training.writer import read_metrics
from tests.training.tiny import MODEL, losses, run, tiny_config

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "integration" / "faulty_train.py"
SECONDS = 240


def _config(folder: Path, output: str, **settings: Any) -> TrainConfig:
    checkpoint = CheckpointConfig(interval=3, load_from=str(MODEL), export=False)
    return tiny_config(folder, output=output, epochs=5.0, checkpoint=checkpoint, **settings)


def _start(
    config: TrainConfig, folder: Path, *, restarts: int | None, faults: list[dict[str, Any]] | None = None
) -> subprocess.Popen[bytes]:
    """Under torchrun with two processes, or as one process for `restarts` None; the log goes to folder/log.txt."""
    save_config(config, folder / "settings.yaml")
    command = [sys.executable]
    if restarts is not None:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["--max-restarts", str(restarts), "--monitor-interval", "0.2"]
    command += [str(SCRIPT), "--config", str(folder / "settings.yaml")]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        "FAULTS": json.dumps(faults or []),
        "EXIT_CODES": str(folder),
    }
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


@pytest.mark.slow
def test_killed_and_hanging_workers_are_restarted_and_the_curve_is_the_same(tmp_path: Path) -> None:
    whole = _config(tmp_path, "whole")
    run(whole, 2)
    config = _config(tmp_path, "faulty", faults=FaultConfig(hang_timeout=15.0))
    at = random.SystemRandom().randint(4, 8)
    faults = [
        {"restart": 0, "rank": 1, "step": at, "kind": "kill"},
        {"restart": 1, "rank": 0, "step": 12, "kind": "kill while saving"},
        {"restart": 2, "rank": 1, "step": 17, "kind": "hang"},
    ]
    process = _start(config, tmp_path, restarts=3, faults=faults)
    code = process.wait(SECONDS)
    log = (tmp_path / "log.txt").read_text()
    assert code == 0, f"killed at step {at}\n{log}"
    found, wanted = losses(config), losses(whole)
    assert [step for step, *_ in found] == list(range(1, 21)), "each step stands there once"
    assert found == wanted, f"killed at step {at}"
    assert "in _hang" in log
    assert re.search(r"\[rank 0\] no progress for \d+ s while training after step 16", log)
    assert f"exit code {HUNG}" in log
    starts = [int(step) for step in re.findall(r"going on after step (\d+)", log)]
    assert len(starts) in (2, 3), "the first kill may come before any checkpoint is complete"
    assert starts[-2] <= 9, "checkpoint 12 was half-written"
    assert starts[-1] >= 12
    assert not list((Path(config.output) / "checkpoints").glob(".unfinished*"))


def _wait_for_step(config: TrainConfig, step: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + SECONDS
    while not any(record["step"] >= step for record in read_metrics(config.output, "train")):
        if process.poll() is not None or time.monotonic() > end:
            pytest.fail(f"the run did not reach step {step}:\n{log.read_text()}")
        time.sleep(0.02)


@pytest.mark.parametrize("restarts", [None, 0], ids=["process", "torchrun"])
def test_sigterm_saves_and_workers_exit_with_0(restarts: int | None, tmp_path: Path) -> None:
    config = _config(tmp_path, "run")
    process = _start(config, tmp_path, restarts=restarts)
    log = tmp_path / "log.txt"
    _wait_for_step(config, 2, process, log)
    process.send_signal(signal.SIGTERM)
    code = process.wait(SECONDS)
    # torchrun itself ends with an error of its own when it was told to stop.
    assert (code == 0) == (restarts is None), log.read_text()
    ranks = range(1 if restarts is None else 2)
    assert [(tmp_path / f"exit{rank}").read_text() for rank in ranks] == ["0" for _ in ranks]
    (summary,) = read_metrics(config.output, "summary")
    assert not summary["finished"]
    last = losses(config)[-1][0]
    newest = latest_checkpoint(Path(config.output) / "checkpoints")
    assert newest is not None
    assert newest.name == f"step-{last:08d}"


def test_ctrl_c_saves_and_ends_with_130(tmp_path: Path) -> None:
    config = _config(tmp_path, "run")
    process = _start(config, tmp_path, restarts=None)
    log = tmp_path / "log.txt"
    _wait_for_step(config, 2, process, log)
    process.send_signal(signal.SIGINT)
    assert process.wait(SECONDS) == 130, log.read_text()
    assert "Traceback" not in log.read_text()
    last = losses(config)[-1][0]
    newest = latest_checkpoint(Path(config.output) / "checkpoints")
    assert newest is not None
    assert newest.name == f"step-{last:08d}"
