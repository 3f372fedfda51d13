"""`torchrun train/train.py` as a user starts it: killed with -9, started again, bit-equal to an undisturbed run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from parrot_sys.cli import save_config
from parrot_sys.testing.distributed import run_distributed
from parrot_sys.training.config import TrainConfig
from parrot_sys.training.trainer import Trainer
from parrot_sys.training.writer import read_metrics
from tests.training.tiny import reached, tiny_config

ROOT = Path(__file__).parents[2]
SECONDS = 120


def _start(config: TrainConfig, folder: Path) -> subprocess.Popen[bytes]:
    save_config(config, folder / "settings.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "train" / "train.py"), "--config", str(folder / "settings.yaml")]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    log = (folder / "log.txt").open("ab")
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def _wait_for_step(config: TrainConfig, step: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + SECONDS
    while not reached(config, step):
        if process.poll() is not None or time.monotonic() > end:
            pytest.fail(f"the run did not reach step {step}:\n{log.read_text()}")
        time.sleep(0.02)


def test_killed_torchrun_goes_on_bit_equal(tmp_path: Path) -> None:
    whole = tiny_config(tmp_path, output="whole", epochs=8.0)
    run_distributed(lambda rank, size: Trainer(whole).run(), 2)

    killed = tiny_config(tmp_path, output="killed", epochs=8.0)
    first = _start(killed, tmp_path)
    _wait_for_step(killed, 5, first, tmp_path / "log.txt")
    launcher = psutil.Process(first.pid)
    for process in (launcher, *launcher.children(recursive=True)):  # listed before the launcher is dead
        process.kill()
    first.wait()
    seen = len(read_metrics(killed.output, "train"))
    assert seen < 32, "the run was over before it could be killed"

    second = _start(killed, tmp_path)
    assert second.wait(SECONDS) == 0, (tmp_path / "log.txt").read_text()
    (summary,) = read_metrics(killed.output, "summary")
    assert summary["finished"]
    assert re.search(r"going on after step [1-9]\d* from", (tmp_path / "log.txt").read_text())
    results = [
        [(record["step"], record["loss"], record["grad_norm"]) for record in read_metrics(config.output, "train")]
        for config in (whole, killed)
    ]
    assert len(results[0]) == 32
    assert results[1] == results[0]
