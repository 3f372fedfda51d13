"""Folders of training checkpoints: written under another name, renamed when complete, found, pruned, cleaned up."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from parrot_sys.cli import save_config
from parrot_sys.config_values import config_to_dict, leaves, read_yaml
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.data.tokenization import tokenizer_fingerprint
from parrot_sys.errors import CheckpointError, CheckpointWriteError, ConfigError
from parrot_sys.megatron.checkpoint.checksums import sync_directory, verify_checksums
from parrot_sys.megatron.checkpoint.store import begin_save
from parrot_sys.megatron.checkpoint.writer import CheckpointWrite, guarded_write
from parrot_sys.models.checkpoint_files import (
    DAMAGED,
    EXPORT,
    PROCESSOR,
    check_whole,
    damaged_folders,
    find_training_checkpoint,
    missing_files,
    step_folders,
)
from parrot_sys.parallel.agreement import on_first_rank
from parrot_sys.staging import remove_leftovers
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.registry import saved_bypass, system_of
from parrot_sys.training.config import TrainConfig
from parrot_sys.training.writer import METRICS_FILE

logger = logging.getLogger(__name__)

_UNFINISHED = ".unfinished-"
_DECIDE = (
    "loss_reduction",
    "precision",
    "data.exif",
    "data.transparency",
    "data.image_position",
    "data.control_tokens",
)
"""Settings beside those of the model and of what is trainable that a resumed run may not change."""
_MAY_CHANGE = ("model.tokenizer_path", "model.vision.path", "model.moe.recompute")
"""Settings of the model that a resumed run may change: they move files or trade time for memory."""


def checkpoint_folders(directory: Path) -> dict[int, Path]:
    """Step -> folder of every whole checkpoint, oldest first. Half-written ones are not among them."""
    return {step: path for step, path in step_folders(directory).items() if not missing_files(path)}


def latest_checkpoint(directory: str | Path) -> Path | None:
    """The newest complete checkpoint below `directory`."""
    folders = checkpoint_folders(Path(directory))
    return folders[max(folders)] if folders else None


def find_checkpoint(path: str | Path) -> Path | None:
    """The training checkpoint that `path` means: itself, the newest of a run, or None if it is something else.

    Raises:
        CheckpointError: `path` does not exist, or means a damaged checkpoint.
    """
    if not Path(path).exists():
        raise CheckpointError(f"checkpoint.load_from must name a directory, but {path} does not exist")
    return find_training_checkpoint(path)


def check_same_model(config: TrainConfig, folder: Path) -> None:
    """Whether the run of `config` can go on from the checkpoint in `folder`.

    Raises:
        ConfigError: the checkpoint belongs to a model or a stage with other settings.
    """
    settings = read_yaml(folder / "config.yaml")
    saved, own = _deciding(settings, config.model), _deciding(config_to_dict(config), config.model)
    for one, other, verb in ((saved, own, "with"), (own, saved, "without")):
        for name in one.keys() - other.keys():
            is_section = any(key.startswith(f"{name}.") for key in other)  # else only a setting of another version
            if name.startswith("model.") and one[name] is None and is_section:
                raise ConfigError(
                    f"this run is {verb} {name}, unlike {folder}; fix: give the same settings, or another --output "
                    "with --checkpoint.load-from for a new run"
                )
    for name, wanted in own.items():
        decides = name.startswith(("model.", "trainable.", "bypass.")) or name in _DECIDE
        if decides and name not in _MAY_CHANGE and name in saved and saved[name] != wanted:
            raise ConfigError(
                f"{folder} was trained with {name} {saved[name]}, now it is {wanted}; fix: give the same settings, "
                "or another --output with --checkpoint.load-from for a new run"
            )
    _check_split(saved, config, folder)


def _deciding(settings: Mapping[str, Any], model: ParrotConfig) -> dict[str, Any]:
    """Dotted name -> value of a run's settings; what learns and what is passed by, part by part of the model."""
    bypass, system = saved_bypass(settings, model), system_of(model)
    asked = {part: learns for part, learns in settings.get("trainable", {}).items() if part in system.parts}
    parts = {
        "trainable": system.learning(model, asked, bypass),
        "bypass": {part: part in bypass for part in system.present_parts(model)},
    }
    return dict(leaves({**settings, **parts}))


def _check_split(saved: Mapping[str, Any], config: TrainConfig, folder: Path) -> None:
    """The distributed optimizer needs main parameters, which the other one saves beside bf16 weights only."""
    if config.optimizer.distributed and config.precision == "fp32" and saved.get("optimizer.distributed") is False:
        raise ConfigError(
            f"{folder} was saved without optimizer.distributed at precision fp32, so its optimizer's state cannot be "
            "split now; fix: set optimizer.distributed=false, or give another --output with --checkpoint.load-from for "
            "a new run"
        )


def check_same_text(processor: ParrotProcessor, folder: Path, common: Mapping[str, Any]) -> None:
    """Whether `processor` makes the same ids of a conversation as the run whose checkpoint lies in `folder`.

    Raises:
        ConfigError: the tokenizer has another hash than the checkpoint's, or the template another version.
    """
    saved = ParrotProcessor.from_pretrained(folder / PROCESSOR, processor.template.name)
    # Both hashes are taken now: another version of the tokenizers library may write the same tokenizer differently.
    then, now = (tokenizer_fingerprint(each.tokenizer) for each in (saved, processor))
    advice = "or start a new run from its weights: another --output with --checkpoint.load-from"
    if then != now:
        raise ConfigError(
            f"the tokenizer is not the one that {folder} was trained with (its hash is {now[:16]}, that of "
            f"{folder / PROCESSOR} is {then[:16]}); fix: give that one as model.tokenizer_path, {advice}"
        )
    if (version := common.get("template", processor.template.version)) != processor.template.version:
        raise ConfigError(
            f"the conversation template {processor.template.name} is {processor.template.version}, but {folder} was "
            f"trained with {version}; fix: go on with the version of this program that has it, {advice}"
        )


def first_batch_size(folder: Path, common: Mapping[str, Any]) -> int:
    """`global_batch_size` that the run of a checkpoint began with; earlier versions saved only the last one."""
    return int(common.get("batch_size") or read_yaml(folder / "config.yaml")["global_batch_size"])


class CheckpointStore:
    """The checkpoints of one run; every rank calls its methods, in the same order."""

    def __init__(self, config: TrainConfig, *, on_progress: Callable[[], None] = lambda: None) -> None:
        """
        Args:
            config: of the run.
            on_progress: called while the store waits for a writer that is getting on.
        """
        self.config = config
        self.directory = Path(config.output) / "checkpoints"
        self.failure: CheckpointWriteError | None = None
        """Why the last checkpoint could not be written; None when it could."""
        self._on_progress = on_progress
        self._pending: tuple[CheckpointWrite, Path, ParrotProcessor | None] | None = None

    def clean(self) -> None:
        """Creates the directory and removes what interrupted runs left half-written."""

        def clean() -> None:
            self.directory.mkdir(parents=True, exist_ok=True)
            remove_leftovers(Path(self.config.output) / EXPORT)
            for path in self.directory.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(path)

        on_first_rank(clean)

    def latest(self) -> Path | None:
        """The newest valid checkpoint; newer ones that are damaged get another name, and a warning names their files.

        Raises:
            CheckpointError: there are checkpoints, but none is valid.
        """
        problems = []
        for folder in on_first_rank(lambda: list(step_folders(self.directory).values()))[::-1]:
            try:
                on_first_rank(functools.partial(check_whole, folder))
                if self.config.checkpoint.verify:
                    verify_checksums(folder)
            except CheckpointError as error:
                problems.append((folder, error))
                continue
            for damaged, problem in problems:
                _log(f"{problem}. Training goes on from {folder.name}; {DAMAGED}{damaged.name} can be removed")
                on_first_rank(functools.partial(self._set_aside, damaged))
            return folder
        if problems:
            # Without its index nothing of a checkpoint can be read.
            unverified = any(not missing_files(folder) for folder, _ in problems) and self.config.checkpoint.verify
            advice = "set checkpoint.verify=false to load the newest as it is, " if unverified else ""
            raise CheckpointError(
                f"no checkpoint below {self.directory} is valid: {'; '.join(str(error) for _, error in problems)}. "
                f"Fix: copy one again, {advice}or give another --output"
            )
        on_first_rank(self._say_from_the_start)
        return None

    def _say_from_the_start(self) -> None:
        """A run that has lost its checkpoints must not begin anew unnoticed."""
        if set_aside := damaged_folders(self.directory):
            raise CheckpointError(
                f"{self.directory} holds damaged checkpoints only ({', '.join(path.name for path in set_aside)}). Fix: "
                "copy one again, remove them to train from step 0, or give another --output"
            )
        if (Path(self.config.output) / METRICS_FILE).is_file():
            _log(f"{self.directory} holds no checkpoint of the run that was here before: training starts at step 0")

    def save(
        self,
        step: int,
        chunks: Any,
        optimizer: Any,
        common: dict[str, Any],
        processor: ParrotProcessor | None,
        *,
        wait: bool = True,
    ) -> None:
        """Writes the checkpoint of `step`, after the one before it, and removes those that the run need not keep.

        When it cannot be written, a warning says why, `failure` holds it, and earlier checkpoints are as they were.

        Args:
            step: steps done.
            chunks: the parts of the model on this rank, without their data-parallel wrappers.
            optimizer: Megatron's.
            common: what all ranks agree on (progress, loader state).
            processor: tokenizer and image preprocessing; lies inside the checkpoint.
            wait: come back when the checkpoint is there. Otherwise `advance` has to be called until it is.
        """
        self.advance(wait=True)
        final = self.directory / f"step-{step:08d}"
        temporary = self.directory / f"{_UNFINISHED}{final.name}"
        values = {**common, "step": step, "world_size": dist.get_world_size()}
        with self._reported():
            on_first_rank(lambda: guarded_write(temporary, lambda: _fresh(temporary)))
            write = begin_save(temporary, chunks, optimizer, values, copy=not wait)
            self._pending = write, final, processor
        self.advance(wait=wait)

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is being written in the background."""
        return self._pending is not None

    @property
    def silent_seconds(self) -> float:
        """Time without a byte of the checkpoint that is being written in the background, as `advance` saw it."""
        return 0.0 if self._pending is None else self._pending[0].silent_seconds

    def advance(self, *, wait: bool = False) -> None:
        """Gives a checkpoint its name once every rank has written its part; `wait` for that. Nothing if none is due."""
        if self._pending is None:
            return
        write, final, processor = self._pending
        if wait:
            write.wait(self._on_progress)
        elif not write.is_done():
            return
        self._pending = None
        with self._reported():
            write.complete(lambda: self._add_files(write.folder, processor))
            on_first_rank(lambda: guarded_write(write.folder, lambda: self._finish(write.folder, final)))
            self.failure = None

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Training goes on when a checkpoint cannot be written; nobody may overlook it."""
        try:
            yield
        except CheckpointWriteError as error:
            self.failure = error
            kept = checkpoint_folders(self.directory)
            _log(
                f"NO CHECKPOINT WAS SAVED: {error}. The next is due in {self.config.checkpoint.interval} steps; until "
                f"then a crash falls back to {kept[max(kept)].name if kept else 'the start'}. Make room!",
                logging.ERROR,
            )

    def _add_files(self, temporary: Path, processor: ParrotProcessor | None) -> None:
        save_config(self.config, temporary / "config.yaml")
        save_config(self.config.model, temporary / "model_config.yaml")
        if processor is not None:
            processor.save_pretrained(temporary / PROCESSOR)

    def _finish(self, temporary: Path, final: Path) -> None:
        """On rank 0: the checkpoint appears under its name, then old ones go."""
        if final.exists():
            self._remove(final)
        os.replace(temporary, final)
        sync_directory(self.directory)
        try:
            self._prune()
        except OSError as error:
            _log(f"old checkpoints could not be removed: {error}")

    def _prune(self) -> None:
        folders = checkpoint_folders(self.directory)
        every = self.config.checkpoint.keep_every
        for step in list(folders)[: -self.config.checkpoint.keep_last]:
            if every is None or step % every:
                self._remove(folders[step])

    def _remove(self, folder: Path) -> None:
        # Renamed first: a folder that is half removed must not look like a checkpoint.
        doomed = self.directory / f"{_UNFINISHED}{folder.name}.old"
        os.replace(folder, doomed)
        shutil.rmtree(doomed)

    def _set_aside(self, folder: Path) -> None:
        """A damaged checkpoint must neither be found again nor count among those that are kept."""
        target = folder.with_name(f"{DAMAGED}{folder.name}")
        if target.exists():
            shutil.rmtree(target)
        os.replace(folder, target)


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _log(text: str, level: int = logging.WARNING) -> None:
    if dist.get_rank() == 0:
        logger.log(level, text)
