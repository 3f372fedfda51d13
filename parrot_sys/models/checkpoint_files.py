"""Folders of training checkpoints: which ones there are, and whether one is whole."""

from __future__ import annotations

import re
from pathlib import Path

from parrot_sys.errors import CheckpointError

INDEX, FORMAT = ".metadata", "metadata.json"
"""Files of every training checkpoint: where each tensor is, and the kind of checkpoint; written last."""
COMMON = "common.pt"
"""Values that are equal on all ranks; later versions of Megatron-Core keep them in the shards."""
CHECKSUMS = "checksums.json"
"""Path of each other file -> [bytes, SHA-256]."""
MODEL_CONFIG = "model_config.yaml"
"""ParrotConfig of the model."""
TRAIN_CONFIG = "config.yaml"
"""Settings of the run; a converted checkpoint has none."""
PROCESSOR = "processor"
"""Folder with the tokenizer and the image preprocessing."""
CHECKPOINTS, EXPORT = "checkpoints", "hf"
"""Folders of a run with its checkpoints and with the exported model."""
DAMAGED = "damaged-"
"""Prefix that a start gives to a checkpoint that it cannot use."""

_STEP = re.compile(r"step-(\d+)")
_MARKS = (INDEX, CHECKSUMS, MODEL_CONFIG, "*.distcp")


def step_folders(directory: Path) -> dict[int, Path]:
    """Step -> folder of every checkpoint of a run, oldest first, whole or not; half-written ones have other names."""
    found = {}
    for path in directory.iterdir() if directory.is_dir() else ():
        if (match := _STEP.fullmatch(path.name)) and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def damaged_folders(directory: Path) -> list[Path]:
    """Checkpoints that an earlier start could not use."""
    return sorted(path for path in directory.glob(f"{DAMAGED}*") if path.is_dir())


def missing_files(folder: Path) -> list[str]:
    """Files without which nothing of a checkpoint can be read."""
    return [name for name in (INDEX, FORMAT) if not (folder / name).is_file()]


def check_whole(folder: str | Path) -> None:
    """Makes sure that the files are there which say what a checkpoint holds.

    Raises:
        CheckpointError: names those that are missing.
    """
    if missing := missing_files(Path(folder)):
        raise CheckpointError(
            f"{folder} is damaged: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; take "
            "another checkpoint, or copy this one again"
        )


def find_training_checkpoint(path: str | Path) -> Path | None:
    """The training checkpoint that `path` is or, as a run, wrote last; None for anything else.

    Raises:
        CheckpointError: that checkpoint is damaged. An older one is never taken in its place: name it.
    """
    path = Path(path)
    if _STEP.fullmatch(path.name) or any(next(path.glob(mark), None) for mark in _MARKS):
        check_whole(path)
        return path
    for directory in (path / CHECKPOINTS, path):
        if folders := step_folders(directory):
            newest = folders[max(folders)]
            check_whole(newest)
            return newest
        if damaged := damaged_folders(directory):
            raise CheckpointError(
                f"{directory} holds damaged checkpoints only ({', '.join(folder.name for folder in damaged)}); take "
                "another one"
            )
    return None
