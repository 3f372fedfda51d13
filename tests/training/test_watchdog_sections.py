"""Every section of a run has its own watch: a hang there ends all ranks with code 75 and their stacks in the log."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from parrot_sys.megatron.checkpoint import writer as checkpoint_writer
from parrot_sys.systems import export as exporting
from parrot_sys.testing.distributed import run_distributed
from parrot_sys.training import feature_cache
from parrot_sys.training import trainer as trainer_module
from parrot_sys.training.config import CheckpointConfig, FaultConfig, TrainConfig
from parrot_sys.training.trainer import Trainer
from parrot_sys.training.watchdog import HUNG, Watchdog
from tests.training.tiny import MODEL, tiny_config


def _wait_for_ever(*_: Any, **__: Any) -> Any:
    threading.Event().wait()


def _in_setup() -> None:
    trainer_module.training_loader = _wait_for_ever


def _in_features() -> None:
    feature_cache._read = _wait_for_ever


def _in_steps() -> None:
    Trainer._batches = _wait_for_ever  # type: ignore[method-assign]


def _in_the_writer() -> None:
    checkpoint_writer._write_bucket = _wait_for_ever


def _in_the_writer_beside_slow_steps() -> None:
    _in_the_writer()
    batches = Trainer._batches

    def slow(self: Trainer) -> Iterator[Any]:
        for each in batches(self):
            time.sleep(0.05)
            yield each

    Trainer._batches = slow  # type: ignore[method-assign]


def _at_the_end_of_a_checkpoint() -> None:
    checkpoint_writer.write_checksums = _wait_for_ever


def _in_export() -> None:
    exporting.write_tensors = _wait_for_ever


@pytest.mark.parametrize(
    ("hang", "setting", "doing", "changes"),
    [
        pytest.param(_in_setup, "setup_timeout", "starting", {}, id="setup"),
        pytest.param(
            _in_features, "features_timeout", "computing image features", {"cache_image_features": True}, id="features"
        ),
        pytest.param(_in_steps, "hang_timeout", "training after step 0", {}, id="steps"),
        pytest.param(_in_the_writer, "checkpoint_timeout", "saving a checkpoint", {}, id="checkpoint"),
        pytest.param(
            _at_the_end_of_a_checkpoint,
            "checkpoint_timeout",
            "saving a checkpoint",
            {},
            id="its-end",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            _at_the_end_of_a_checkpoint,
            "checkpoint_timeout",
            "completing a checkpoint",
            {"max_steps": 120, "checkpoint": CheckpointConfig(interval=60, load_from=str(MODEL))},
            id="its-end-in-the-background",
        ),
        pytest.param(
            _in_the_writer_beside_slow_steps,
            "checkpoint_timeout",
            "a checkpoint is written in the background",
            {"max_steps": 200, "checkpoint": CheckpointConfig(interval=40, load_from=str(MODEL))},
            id="in-the-background",
        ),
        pytest.param(_in_export, "export_timeout", "exporting the model", {}, id="export"),
    ],
)
def test_a_hang_ends_with_the_stacks(
    hang: Callable[[], None],
    setting: str,
    doing: str,
    changes: dict[str, Any],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    checkpoint = CheckpointConfig(interval=1, load_from=str(MODEL))
    config = replace(tiny_config(tmp_path, copies=1, max_steps=1, checkpoint=checkpoint), **changes)
    config = replace(config, faults=FaultConfig(**{setting: 1.0}))

    def main(rank: int, size: int) -> None:
        if rank == 0:
            hang()
        Trainer(config).run()

    with pytest.raises(RuntimeError) as error:
        run_distributed(main, 2, timeout=60)
    log = capfd.readouterr().err
    assert str(error.value).count(f"exit code {HUNG}") == 2, log
    for rank in (0, 1):
        assert re.search(rf"\[rank {rank}\] no progress for \d+ s while {doing}", log), log
        assert f"[rank {rank}] ended by the watchdog (faults.{setting}=1) with exit code {HUNG}" in log
    assert "in _wait_for_ever" in log


def test_a_hang_before_ranks_have_met(capfd: pytest.CaptureFixture[str]) -> None:
    child = os.fork()
    if child == 0:
        with Watchdog(FaultConfig(setup_timeout=0.5)).section("setup", "starting"):
            _wait_for_ever()
    end = time.monotonic() + 20
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < end:
        time.sleep(0.05)
    if done[0] == 0:
        os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(done[1]) == HUNG
    assert "in _wait_for_ever" in capfd.readouterr().err


def test_ranks_that_wait_for_the_images_of_others_see_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The second rank has nothing to do in most rounds, for longer than it may be silent."""

    def slow(read: Callable[..., Any]) -> Callable[..., Any]:
        def each(*args: Any, **kwargs: Any) -> Any:
            time.sleep(0.5 if dist.get_rank() == 0 else 0.0)
            return read(*args, **kwargs)

        return each

    config: TrainConfig = replace(
        tiny_config(tmp_path, copies=1, max_steps=1),
        cache_image_features=True,
        faults=FaultConfig(features_timeout=1.5),
    )
    monkeypatch.setattr(feature_cache, "_IMAGES_PER_WRITE", 1)
    monkeypatch.setattr(feature_cache, "_read", slow(feature_cache._read))
    run_distributed(lambda rank, size: Trainer(config).run()["steps"], 2)
    assert "no progress" not in capfd.readouterr().err
