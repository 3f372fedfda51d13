"""Inputs of a run: the processor of its model, and the loaders of its training and validation records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from parrot_sys import platform
from parrot_sys.data.config import DataConfig
from parrot_sys.data.loader import ParrotDataLoader
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.data.step_loader import StepLoader
from parrot_sys.data.stream.config import StreamConfig
from parrot_sys.data.stream.loader import StreamLoader
from parrot_sys.megatron.image_gather import image_share
from parrot_sys.megatron.runtime.loader_ranks import stream_ranks
from parrot_sys.megatron.runtime.optimizer import data_parallel_rank, data_parallel_world_size
from parrot_sys.models.checkpoint_files import PROCESSOR
from parrot_sys.training.config import TrainConfig


def load_processor(config: TrainConfig, checkpoint: Path | None) -> ParrotProcessor:
    """From `model.tokenizer_path`, else from the checkpoint that training starts from or goes on from.

    Args:
        config: of the run.
        checkpoint: that training checkpoint; None where the run starts from a model in the released layout.
    """
    model = config.model
    if model.tokenizer_path is not None:
        processor = ParrotProcessor.for_tower(
            model.tokenizer_path, model.vision.type, model.vision.image_size, model.template
        )
    else:
        folder = checkpoint / PROCESSOR if checkpoint else Path(config.checkpoint.load_from or "")
        processor = ParrotProcessor.from_pretrained(folder, model.template)
    return processor.with_data_config(config.data).with_tiling(model.tiling)


def training_loader(
    config: TrainConfig, processor: ParrotProcessor, *, on_progress: Callable[[], None] = lambda: None
) -> StepLoader:
    """This rank's share of the training records; `on_progress` is called now and then while an index is built."""
    if not config.data.stream.enabled:
        return _loader(config, config.data, processor, on_progress, learns=True)
    return StreamLoader(
        config.data,
        processor,
        num_visual_rows=config.model.rows_per_image,
        max_seq_len=config.model.max_seq_len,
        guidance=config.model.moe.guidance,
        global_batch_size=config.global_batch_size,
        ranks=stream_ranks(),
        images=image_share(),
        pin_memory=platform.cuda_available(),
    )


def validation_loader(
    config: TrainConfig, processor: ParrotProcessor, *, on_progress: Callable[[], None] = lambda: None
) -> ParrotDataLoader:
    """This rank's share of the held-out records, read as they are: the mix of the training data is not theirs."""
    data = replace(
        config.data,
        paths=config.validation.paths,
        image_roots=config.validation.image_roots,
        names=(),
        languages=(),
        weights=(),
        language_weights={},
        language_alpha=None,
        caps={},
        language_caps={},
        curriculum=(),
        text_ratio=None,
        stream=StreamConfig(),
    )
    return _loader(config, data, processor, on_progress, learns=False)


def _loader(
    config: TrainConfig,
    data: DataConfig,
    processor: ParrotProcessor,
    on_progress: Callable[[], None],
    *,
    learns: bool,
) -> ParrotDataLoader:
    return ParrotDataLoader(
        data,
        processor,
        num_visual_rows=config.model.rows_per_image,
        max_seq_len=config.model.max_seq_len,
        guidance=config.model.moe.guidance,
        needs_labels=learns,
        global_batch_size=config.global_batch_size,
        dp_rank=data_parallel_rank(),
        dp_size=data_parallel_world_size(),
        index_dir=Path(config.output) / "index",
        on_progress=on_progress,
        images=image_share(),
        pin_memory=platform.cuda_available(),
    )
