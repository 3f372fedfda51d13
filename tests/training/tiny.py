"""A tiny training run: the released-layout fixture model and its eight conversations, four times over."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch._dynamo

from parrot_sys.data.batch import PackedBatch
from parrot_sys.data.config import DataConfig
from parrot_sys.logging import setup_logging
from parrot_sys.systems.hf_config import config_from_hf, read_json
from parrot_sys.testing.distributed import run_distributed
from parrot_sys.training.checkpoint import latest_checkpoint
from parrot_sys.training.config import (
    CheckpointConfig,
    LoggingConfig,
    OptimizerConfig,
    TrainConfig,
    ValidationConfig,
)
from parrot_sys.training.trainer import Trainer
from parrot_sys.training.writer import read_metrics

FIXTURE = Path(__file__).parents[1] / "fixtures" / "parrot_tiny"
MODEL = FIXTURE / "model"
Hook = Callable[[Trainer], None]


def write_records(path: Path, copies: int = 4) -> Path:
    """Writes the conversations of the fixture as a data set; the images stay where they are."""
    records = []
    for copy in range(copies):
        for record in json.loads((FIXTURE / "conversations.json").read_text(encoding="utf-8")):
            record = {**record, "id": f"{copy}-{record['id']}"}
            if record["image"] is None:
                del record["image"]
            else:
                record["image"] = f"image_{record['image']}.png"
            records.append(record)
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def tiny_config(folder: Path, *, output: str = "run", copies: int = 4, **settings: Any) -> TrainConfig:
    """32 samples in steps of 8: 4 steps an epoch, 2 epochs; a checkpoint every 3 steps, so also in mid-epoch."""
    data = DataConfig(
        paths=(str(write_records(folder / "records.json", copies)),), image_roots=(str(FIXTURE),), prefetch_steps=1
    )
    defaults: dict[str, Any] = {
        "model": replace(config_from_hf(read_json(MODEL / "config.json"), MODEL), max_seq_len=512),
        "data": data,
        "precision": "fp32",
        "global_batch_size": 8,
        "epochs": 2.0,
        "optimizer": OptimizerConfig(lr=1e-3, lrs={"projector": 2e-3}),
        "checkpoint": CheckpointConfig(interval=3, load_from=str(MODEL), export=False),
        "logging": LoggingConfig(interval=1, trackers=(), progress=False),
        "validation": ValidationConfig(),
    }
    return TrainConfig(output=str(folder / output), **(defaults | settings))


Hook = Callable[[Trainer], None]


def run(config: TrainConfig, ranks: int = 1, hook: Hook | None = None) -> list[dict[str, Any]]:
    """Trains in forked processes; the summary of each rank."""

    def rank_main(rank: int, size: int) -> dict[str, Any]:
        setup_logging()
        trainer = Trainer(config)
        if hook is not None:
            hook(trainer)
        return trainer.run()

    return run_distributed(rank_main, ranks)


def losses(config: TrainConfig) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of every record."""
    return [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(config.output, "train")]


def reached(config: TrainConfig, step: int) -> bool:
    """Whether a step is done and a checkpoint, which is written in the background, is there."""
    if latest_checkpoint(Path(config.output) / "checkpoints") is None:
        return False
    return any(record["step"] >= step for record in read_metrics(config.output, "train"))


def signal_before(step: int, number: int, rank: int = 0) -> Hook:
    """Sends this process a signal when `step` is about to run."""

    def hook(trainer: Trainer) -> None:
        batches = trainer._batches

        def interrupted() -> Iterator[list[PackedBatch]]:
            for batch in batches():
                if trainer.step + 1 == step and torch.distributed.get_rank() == rank:
                    os.kill(os.getpid(), number)
                yield batch

        trainer._batches = interrupted

    return hook


def kill_in_save(step: int) -> Hook:
    """Kills the first rank when the tensors of a checkpoint are written but it does not have its name yet."""

    def hook(trainer: Trainer) -> None:
        finish = trainer.checkpoints._finish

        def killed(temporary: Path, final: Path, *rest: Any) -> None:
            if final.name == f"step-{step:08d}":
                os.kill(os.getpid(), signal.SIGKILL)
            finish(temporary, final, *rest)

        trainer.checkpoints._finish = killed

    return hook
