"""Every command that reads a checkpoint, and what it says of one that it refuses."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from parrot_sys.cli import save_config
from parrot_sys.errors import CheckpointError
from parrot_sys.evaluation import main as evaluation
from parrot_sys.inference import chat as chatting
from parrot_sys.inference import convert as converting
from parrot_sys.megatron.runtime import initialize
from parrot_sys.testing.distributed import run_distributed
from parrot_sys.training import main as training
from parrot_sys.training.config import CheckpointConfig
from tests.evaluation.tables import write_table
from tests.training.tiny import MODEL, run, tiny_config

Reader = Callable[[Path, Path], None]
"""Called with a working folder, which holds the run, and a checkpoint."""
STEP = "step-00000001"


def run_of_one_step(folder: Path) -> Path:
    """Trains one step into folder/run."""
    checkpoint = CheckpointConfig(interval=1, load_from=str(MODEL), export=False)
    run(tiny_config(folder, copies=1, max_steps=1, checkpoint=checkpoint))
    return folder


def convert(folder: Path, checkpoint: Path) -> None:
    converting.main(["--checkpoint", str(checkpoint), "--output", str(folder / "converted")])


def chat(folder: Path, checkpoint: Path) -> None:
    chatting.main(["--checkpoint", str(checkpoint), "--message", "hello", "--max-new-tokens", "1"])


def evaluate(folder: Path, checkpoint: Path) -> None:
    row = {"index": 0, "question": "?", "A": "a", "B": "b", "answer": "A", "category": "c"}
    table = write_table(folder / "MMMB_en.tsv", [row])
    arguments = ["--checkpoint", str(checkpoint), "--data", str(table), "--output", str(folder / "answers")]
    evaluation.main([*arguments, "--mode", "likelihood"])


def _train(folder: Path, checkpoint: Path, *, resuming: bool) -> None:
    start = MODEL if resuming else checkpoint
    config = tiny_config(folder, copies=1, max_steps=2, checkpoint=CheckpointConfig(load_from=str(start), export=False))
    if not resuming:
        config = replace(config, output=str(folder / "new"))
    save_config(config, folder / "settings.yaml")
    initialize.shutdown = lambda: None  # the process groups belong to `run_distributed`, whose process this is
    training.main(["--config", str(folder / "settings.yaml")])


def load_from(folder: Path, checkpoint: Path) -> None:
    _train(folder, checkpoint, resuming=False)


def resume(folder: Path, checkpoint: Path) -> None:
    _train(folder, checkpoint, resuming=True)


READERS: list[Reader] = [convert, chat, evaluate, load_from, resume]


def name_of(reader: Reader) -> str:
    """For the ids of tests."""
    return reader.__name__


def refused(reader: Reader, folder: Path, checkpoint: Path) -> str:
    """The message of the error that ends the command; empty when it comes to its end."""

    def main(rank: int, size: int) -> str:
        os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # what a user may have set for another program
        try:
            reader(folder, checkpoint)
        except CheckpointError as error:
            return str(error)
        return ""

    (message,) = run_distributed(main, 1)
    return message
