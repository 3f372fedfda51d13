"""Model and tokenizer that record files are checked and indexed for, as `parrot train` would take them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from parrot_sys.config_values import load_config
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.files import read_json
from parrot_sys.models.checkpoint_files import MODEL_CONFIG, PROCESSOR
from parrot_sys.paths import INPUT_FOLDER
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.hf_config import config_from_hf


@dataclass(kw_only=True, frozen=True, slots=True)
class StartConfig:
    """Weights that training starts from."""

    load_from: Annotated[str | None, INPUT_FOLDER] = None
    """Checkpoint whose tokenizer is used when model.tokenizer_path is not set, and whose model when no setting of
    `model` is."""


def model_and_processor(model: ParrotConfig, start: str | None) -> tuple[ParrotConfig, ParrotProcessor | None]:
    """The model, taken from a checkpoint where no setting names one, and the processor of its texts and pictures.

    Args:
        model: settings of the model.
        start: `checkpoint.load_from`.

    Returns:
        The processor is None where neither `model.tokenizer_path` nor `start` says which.
    """
    folder = Path(start or "")
    if start is not None:
        from parrot_sys.training.checkpoint import find_checkpoint  # (which imports Megatron: seconds)

        training = find_checkpoint(start)
        if model == ParrotConfig():
            model = _model_of(training, folder)
        folder = training / PROCESSOR if training is not None else folder
    if model.tokenizer_path is not None:
        processor = ParrotProcessor.for_tower(
            model.tokenizer_path, model.vision.type, model.vision.image_size, model.template
        )
        return model, processor
    return model, None if start is None else ParrotProcessor.from_pretrained(folder, model.template)


def _model_of(training: Path | None, directory: Path) -> ParrotConfig:
    if training is not None:
        return load_config(ParrotConfig, training / MODEL_CONFIG)
    return config_from_hf(read_json(directory / "config.json"), directory)
