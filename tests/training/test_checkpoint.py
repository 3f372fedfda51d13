"""Checkpoints of a run: written beside training, kept, damaged, on a full disk, moved to other numbers of ranks."""

from __future__ import annotations

import ctypes
import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from parrot_sys.errors import CheckpointError, CheckpointWriteError
from parrot_sys.inference.convert import ConvertConfig, convert
from parrot_sys.logging import setup_logging
from parrot_sys.megatron.checkpoint import writer as checkpoint_writer
from parrot_sys.models.checkpoint_files import CHECKSUMS
from parrot_sys.testing.distributed import run_distributed
from parrot_sys.training.checkpoint import latest_checkpoint
from parrot_sys.training.config import CheckpointConfig, OptimizerConfig, TrainConfig
from parrot_sys.training.trainer import Trainer
from parrot_sys.training.writer import read_metrics
from tests.training.tiny import MODEL, Hook, losses, run, signal_before, tiny_config


def _config(folder: Path, output: str = "run", *, steps: int = 4, **checkpoint: Any) -> TrainConfig:
    settings = {"interval": 1, "load_from": str(MODEL), "export": False} | checkpoint
    return tiny_config(folder, output=output, max_steps=steps, checkpoint=CheckpointConfig(**settings))


def _names(config: TrainConfig) -> list[str]:
    return sorted(path.name for path in (Path(config.output) / "checkpoints").iterdir())


def _before(step: int, action: Callable[[Trainer], None]) -> Hook:
    """Runs `action` on every rank when `step` is about to run."""

    def hook(trainer: Trainer) -> None:
        batches = trainer._batches

        def watched() -> Any:
            for batch in batches():
                if trainer.step + 1 == step:
                    action(trainer)
                yield batch

        trainer._batches = watched

    return hook


def test_the_last_ones_and_every_nth_are_kept(tmp_path: Path) -> None:
    config = _config(tmp_path, steps=8, keep_last=2, keep_every=3)
    run(config)
    assert _names(config) == ["step-00000003", "step-00000006", "step-00000007", "step-00000008"]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """The writer of step 2 is held until step 4 begins: the checkpoint has the state of step 2, and that of 4 waits."""
    whole, config = (_config(tmp_path, name, steps=6, interval=2, keep_last=3) for name in ("whole", "run"))
    run(whole)

    def rank_main(rank: int, size: int) -> tuple[list[str], list[str]]:
        seen: dict[int, list[str]] = {}
        allowed = threading.Event()
        write = checkpoint_writer._write_bucket
        checkpoint_writer._write_bucket = lambda *args: allowed.wait(30) and write(*args)

        def look(trainer: Trainer) -> None:
            seen[trainer.step] = _names(config)
            allowed.set()

        trainer = Trainer(config)
        for step in (4, 5):
            _before(step, look)(trainer)
        trainer.run()
        return seen[3], seen[4]

    ((before, after),) = run_distributed(rank_main, 1)
    assert before == [".unfinished-step-00000002"]
    assert "step-00000002" in after
    assert losses(config) == losses(whole)
    for step in (4, 6):
        shutil.rmtree(Path(config.output) / "checkpoints" / f"step-{step:08d}")
    (summary,) = run(config)
    assert summary["steps"] == 4
    assert losses(config) == losses(whole)


def _damage(file: Path, how: str) -> str:
    """Damages a file; what the message says of it."""
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
        return "No such file"
    if how == "cut":
        file.write_bytes(content[:-1])
        return f"has {len(content) - 1} bytes instead of {len(content)}"
    file.write_bytes(content[:-200] + bytes([content[-200] ^ 1]) + content[-199:])
    return "has other bytes than were written"


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, stopped = _config(tmp_path, "whole"), _config(tmp_path)
    run(whole, 2)
    run(stopped, 2, signal_before(3, signal.SIGTERM))
    for how in ("flipped", "cut", "missing"):
        config = replace(stopped, output=str(tmp_path / how))
        shutil.copytree(stopped.output, config.output)
        newest = latest_checkpoint(Path(config.output) / "checkpoints")
        assert newest is not None
        message = _damage(newest / "__1_0.distcp", how)
        capfd.readouterr()
        (summary, _) = run(config, 2)
        assert summary["steps"] == 2, "it went on from step 2"
        assert losses(config) == losses(whole)
        log = capfd.readouterr().err
        assert "step-00000003 is damaged: __1_0.distcp" in log
        assert message in log
        assert _names(config) == ["damaged-step-00000003", "step-00000003", "step-00000004"]


def test_no_valid_checkpoint_ends_the_start_and_weights_are_verified(tmp_path: Path) -> None:
    config = _config(tmp_path, steps=1)
    run(config)
    folder = Path(config.output) / "checkpoints" / "step-00000001"
    names = json.loads((folder / CHECKSUMS).read_text())
    assert {".metadata", "config.yaml", "processor/tokenizer.json"} <= names.keys()
    assert set(names) == {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {CHECKSUMS}
    with (folder / "__0_0.distcp").open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")

    def start(rank: int, size: int, config: TrainConfig) -> str:
        with pytest.raises(CheckpointError) as error:
            Trainer(config)
        return str(error.value)

    (message,) = run_distributed(start, 1, config)
    assert "no checkpoint below" in message
    assert "__0_0.distcp has other bytes than were written" in message
    other = _config(tmp_path, "other", load_from=str(folder))
    (message,) = run_distributed(start, 1, other)
    assert "__0_0.distcp has other bytes than were written" in message
    (folder / CHECKSUMS).unlink()
    (message,) = run_distributed(start, 1, config)
    assert f"{CHECKSUMS} is missing" in message


def test_two_then_one_then_four_ranks_take_the_same_samples(tmp_path: Path) -> None:
    optimizer = OptimizerConfig(lr=1e-3, distributed=True)
    whole, moved = (replace(_config(tmp_path, name, steps=6), optimizer=optimizer) for name in ("whole", "moved"))

    def train(rank: int, size: int, config: TrainConfig, stop_behind: int) -> dict[int, list[str]]:
        trainer = Trainer(config)
        taken: dict[int, list[str]] = {}
        batches = trainer._batches

        def watched() -> Any:
            for step in batches():
                taken[trainer.step + 1] = [record for batch in step for record in batch.record_ids]
                if trainer.step + 1 == stop_behind:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield step

        trainer._batches = watched
        trainer.run()
        return taken

    def samples(config: TrainConfig, *parts: tuple[int, int]) -> dict[int, list[str]]:
        steps: dict[int, list[str]] = {}
        for ranks, stop_behind in parts:
            for taken in run_distributed(train, ranks, config, stop_behind):
                for step, records in taken.items():
                    steps[step] = sorted([*steps.get(step, []), *records])
        return steps

    assert samples(moved, (2, 2), (1, 4), (4, 0)) == samples(whole, (1, 0))
    assert [loss for _, loss, _ in losses(moved)] == pytest.approx([loss for _, loss, _ in losses(whole)], rel=1e-5)


def test_a_checkpoint_of_two_ranks_is_exported(tmp_path: Path) -> None:
    """`parrot convert` of the last checkpoint gives what the run itself exported."""
    config = replace(_config(tmp_path, steps=1, export=True), optimizer=OptimizerConfig(lr=1e-3, distributed=True))
    run(config, 2)

    def export(rank: int, size: int) -> None:
        convert(ConvertConfig(checkpoint=Path(config.output), output=tmp_path / "converted"))

    run_distributed(export, 1)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "converted" / name).read_bytes() == (Path(config.output) / "hf" / name).read_bytes()


def _in_small_disk(job: Callable[[Path], Any], megabytes: float) -> Any:
    """Runs `job(folder)` in a process that alone sees a file system of this size there; skips without the right."""
    reader, writer = multiprocessing.Pipe(duplex=False)

    def enter(folder: Path) -> None:
        clone_new_mounts = 0x00020000
        if ctypes.CDLL(None, use_errno=True).unshare(clone_new_mounts):
            raise PermissionError(ctypes.get_errno(), "unshare")
        for command in (
            ["mount", "--make-rprivate", "/"],
            ["mount", "-t", "tmpfs", "-o", f"size={int(megabytes * 1024)}k", "tmpfs", str(folder)],
        ):
            if subprocess.run(command, capture_output=True, check=False).returncode:
                raise PermissionError(errno.EPERM, "mount")

    def main(folder: Path) -> None:
        try:
            enter(folder)
        except PermissionError as error:
            writer.send(error)
            return
        try:
            writer.send(job(folder))
        except BaseException as error:
            writer.send(RuntimeError(str(error)))

    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"parrot_small_disk_{os.getpid()}"
    folder.mkdir()
    try:
        process = multiprocessing.get_context("fork").Process(target=main, args=(folder,))
        process.start()
        result = reader.recv()
        process.join()
    finally:
        folder.rmdir()
    if isinstance(result, PermissionError):
        # A full disk needs a file system of its own to fill, and mounting one a user namespace.
        pytest.skip(f"a small file system cannot be mounted here: {result.strerror} is not permitted")
    if isinstance(result, Exception):
        raise result
    return result


def _fill(folder: Path) -> None:
    try:
        with (folder / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


def test_a_full_disk_leaves_the_last_checkpoint_and_training_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = _config(tmp_path, "whole", steps=6, interval=2)
    run(whole, 2)

    def job(folder: Path) -> tuple[Any, ...]:
        config = replace(whole, output=str(folder / "run"))
        during: list[str] = []

        def hook(trainer: Trainer) -> None:
            rank = torch.distributed.get_rank()
            if rank == 0:
                _before(4, lambda _: _fill(folder))(trainer)
                _before(6, lambda _: (during.extend(_names(config)), (folder / "filler").unlink()))(trainer)

        def rank_main(rank: int, size: int) -> list[str]:
            setup_logging()
            trainer = Trainer(config)
            hook(trainer)
            trainer.run()
            return during

        seen, _ = run_distributed(rank_main, 2)
        again = replace(config, max_steps=8)

        def full_at_the_end(rank: int, size: int) -> str:
            trainer = Trainer(again)
            if rank == 0:
                _before(7, lambda _: _fill(folder))(trainer)
            with pytest.raises(CheckpointWriteError) as error:
                trainer.run()
            return str(error.value)

        after = losses(config), _names(config)
        return seen, *after, run_distributed(full_at_the_end, 2), _names(config)

    seen, found, names, messages, last = _in_small_disk(job, 48)
    assert seen == ["step-00000002"], "nothing is left of checkpoint 4"
    assert found == losses(whole)
    assert names == ["step-00000002", "step-00000006"]
    assert "NO CHECKPOINT WAS SAVED" in capfd.readouterr().err
    for message in messages:
        assert "step-00000008 could not be written" in message
        assert "No space left on device" in message or "file write failed" in message
    assert last == names, "the last valid ones are still there"


def test_records_wait_for_room_on_the_disk(tmp_path: Path) -> None:
    def job(folder: Path) -> list[int]:
        from parrot_sys.training.writer import MetricsWriter

        config = replace(tiny_config(folder), output=str(folder))

        def write(rank: int, size: int) -> None:
            with MetricsWriter(config, total_steps=9) as writer:
                writer.write("train", 1, {"loss": 1.0})
                _fill(folder)
                for step in range(2, 9):
                    writer.write("train", step, {"loss": 1.0, "long": "x" * 1000})
                (folder / "filler").unlink()
                writer.write("train", 9, {"loss": 1.0})

        run_distributed(write, 1)
        return [record["step"] for record in read_metrics(folder)]

    assert _in_small_disk(job, 0.1) == list(range(1, 10))
