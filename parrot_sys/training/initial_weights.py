"""Weights that a run starts from: a training checkpoint, a released model, or a vision tower alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from parrot_sys.megatron.checkpoint.store import load_model_weights
from parrot_sys.megatron.model import MultimodalModel
from parrot_sys.megatron.state_dict import load_tower, refuse_non_finite
from parrot_sys.models.finite import NonFinite
from parrot_sys.systems.load import load_released
from parrot_sys.training.config import TrainConfig


def load_initial_weights(chunks: Sequence[MultimodalModel], config: TrainConfig, source: Path | None) -> None:
    """Fills the parts of the model on this rank; every rank calls this.

    Args:
        chunks: to be filled.
        config: of the run.
        source: the training checkpoint that `checkpoint.load_from` is, if it is one.

    Raises:
        CheckpointError: the weights do not fit the model, or are NaN or infinite where that is not allowed.
    """
    settings = config.checkpoint
    if source is not None:
        load_model_weights(source, chunks, verify=settings.verify)
        refuse_non_finite(chunks, source, allow=settings.allow_non_finite)
        return
    for model in chunks:
        tower = model.vision_tower
        if settings.load_from is not None:
            load_released(model, settings.load_from, allow_non_finite=settings.allow_non_finite)
        elif tower is not None and not config.learning()["vision"]:
            group, found = model.tp_group, NonFinite()
            load_tower(tower, config.model.vision, rank=group.rank(), size=group.size(), non_finite=found)
            found.refuse(config.model.vision.path, allow=settings.allow_non_finite)
