"""Folders of training checkpoints: written under another name, renamed when complete, found, pruned, cleaned up."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from parrot_sys.cli import save_config
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.errors import CheckpointError
from parrot_sys.megatron.checkpointing import is_complete, save_distributed
from parrot_sys.training.config import TrainConfig

_NAME = re.compile(r"step-(\d+)")
_UNFINISHED = ".unfinished-"
PROCESSOR = "processor"
"""Folder inside a checkpoint with the tokenizer and the image preprocessing."""


def checkpoint_folders(directory: Path) -> dict[int, Path]:
    """Step -> folder of every complete checkpoint, oldest first. Half-written ones are not among them."""
    found = {}
    for path in directory.iterdir() if directory.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and is_complete(path):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def latest_checkpoint(directory: str | Path) -> Path | None:
    """The newest complete checkpoint below `directory`."""
    folders = checkpoint_folders(Path(directory))
    return folders[max(folders)] if folders else None


def find_checkpoint(path: str | Path) -> Path | None:
    """The training checkpoint that `path` means: itself, the newest of a run, or None if it is something else.

    Raises:
        CheckpointError: `path` does not exist.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"checkpoint.load_from must name a directory, but {path} does not exist")
    if is_complete(path):
        return path
    return latest_checkpoint(path / "checkpoints") or latest_checkpoint(path)


class CheckpointStore:
    """The checkpoints of one run; every rank calls its methods."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.directory = Path(config.output) / "checkpoints"

    def clean(self) -> None:
        """Creates the directory and removes what interrupted runs left half-written."""
        if dist.get_rank() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in self.directory.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(path)
        dist.barrier()

    def latest(self) -> Path | None:
        """The newest complete checkpoint, as rank 0 sees it."""
        found = [latest_checkpoint(self.directory) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def save(
        self, step: int, chunks: Any, optimizer: Any, common: dict[str, Any], processor: ParrotProcessor | None
    ) -> Path:
        """Writes the checkpoint of `step` and removes the oldest beyond `checkpoint.keep_last`.

        Args:
            step: steps done.
            chunks: the parts of the model on this rank, without their data-parallel wrappers.
            optimizer: Megatron's.
            common: what all ranks agree on (progress, loader state).
            processor: tokenizer and image preprocessing; lies inside the checkpoint.

        Returns:
            The folder.
        """
        final = self.directory / f"step-{step:08d}"
        temporary = self.directory / f"{_UNFINISHED}{final.name}"
        _on_first_rank(lambda: _fresh(temporary))
        save_distributed(temporary, chunks, optimizer, {**common, "step": step, "world_size": dist.get_world_size()})
        _on_first_rank(lambda: self._finish(temporary, final, processor))
        return final

    def _finish(self, temporary: Path, final: Path, processor: ParrotProcessor | None) -> None:
        save_config(self.config, temporary / "config.yaml")
        save_config(self.config.model, temporary / "model_config.yaml")
        if processor is not None:
            processor.save_pretrained(temporary / PROCESSOR)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        folders = checkpoint_folders(self.directory)
        for step in list(folders)[: -self.config.checkpoint.keep_last]:
            # Renamed first: a folder that is half removed must not look like a checkpoint.
            doomed = self.directory / f"{_UNFINISHED}{folders[step].name}"
            os.replace(folders[step], doomed)
            shutil.rmtree(doomed)


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _on_first_rank(action: Callable[[], None]) -> None:
    if dist.get_rank() == 0:
        action()
    dist.barrier()
