"""Digests that tie answers to the checkpoint that gave them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from parrot_sys.config_values import load_config, read_yaml
from parrot_sys.errors import CheckpointError
from parrot_sys.models.checkpoint_files import MODEL_CONFIG, PROCESSOR, TRAIN_CONFIG, find_training_checkpoint
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.registry import saved_bypass


def checkpoint_digest(checkpoint: Path) -> str:
    """SHA-256 over what decides the answers of a checkpoint: weights, settings of the model, tokenizer, preprocessing.

    The state of an optimizer is left out. Of a training run the newest checkpoint is taken.

    Raises:
        CheckpointError: the folder holds no file.
    """
    training = find_training_checkpoint(checkpoint)
    folder = training or checkpoint
    used = _used_of_training if training else _used_of_released
    files = sorted(path for path in folder.rglob("*") if path.is_file() and used(path.relative_to(folder)))
    if not files:
        raise CheckpointError(f"{folder} holds no checkpoint; wanted a folder with config.json and weights")
    digest = hashlib.sha256()
    if training is not None:
        from parrot_sys.megatron.checkpoint.digest import weights_digest

        train = read_yaml(training / TRAIN_CONFIG) if (training / TRAIN_CONFIG).is_file() else {}
        bypass = saved_bypass(train, load_config(ParrotConfig, training / MODEL_CONFIG))
        digest.update(f"{weights_digest(training)} {sorted(bypass)}".encode())
    for path in files:
        digest.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _used_of_training(path: Path) -> bool:
    return path.name == MODEL_CONFIG or path.parts[0] == PROCESSOR


def _used_of_released(path: Path) -> bool:
    """False for what trainers of other programs write beside a model."""
    others = ("optimizer", "scheduler", "rng_state", "scaler", "training_args", "trainer_state", "global_step")
    return not path.parts[0].startswith(others)
