"""`load_pretrained` and `save_pretrained`: directories <-> model and processor."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from parrot_sys import platform
from parrot_sys.config_values import load_config, read_yaml
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.data.tokenizer_files import MissingTokenizer
from parrot_sys.errors import CheckpointError
from parrot_sys.files import Fields, read_json
from parrot_sys.models.checkpoint_files import MODEL_CONFIG, PROCESSOR, TRAIN_CONFIG, find_training_checkpoint
from parrot_sys.models.tensor_files import TensorFiles
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.hf_config import CONFIG, config_from_hf
from parrot_sys.systems.registry import saved_bypass
from parrot_sys.systems.section import Compat

if TYPE_CHECKING:
    from parrot_sys.inference.model import ParrotForConditionalGeneration
    from parrot_sys.megatron.model import MultimodalModel
    from parrot_sys.megatron.runtime.initialize import ParallelConfig
    from parrot_sys.systems.export import ReleasedSource

logger = logging.getLogger(__name__)


def load_pretrained(
    path: str | Path,
    *,
    device: torch.device | str | None = "cpu",
    dtype: torch.dtype | str | None = None,
    parallel: ParallelConfig | None = None,
    compat: Compat | None = None,
    allow_non_finite: bool = False,
) -> tuple[ParrotForConditionalGeneration, ParrotProcessor]:
    """Model (in evaluation mode, vision tower frozen) and processor.

    Joins or makes the process groups that Megatron needs: one process of its own when there is none.

    Args:
        path: directory in the released Parrot layout, a training checkpoint, or a training run (its newest checkpoint).
        device: where the model goes; None takes the GPU if there is one.
        dtype: of the parameters (`"bfloat16"` or torch.bfloat16); None keeps that of the checkpoint.
        parallel: layout, when several processes load one model together.
        compat: whose rules the model follows where the public code does not do what the paper says; None: as the
            checkpoint says. See `ParrotConfig.with_compat`.
        allow_non_finite: load NaN and infinite weights with a warning, for those who look for their cause.

    Raises:
        CheckpointError: nothing usable at `path`; missing, unexpected or mis-shaped tensors, or some with weights that
            are no numbers, listed by name; a tokenizer or pictures of another model.
        ConfigError: the checkpoint describes a model that Parrot cannot be; `device` does not exist here.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is no directory; wanted a released-layout checkpoint or a training checkpoint"
        )
    wanted = platform.parse_dtype(dtype) if isinstance(dtype, str) else dtype
    target = platform.parse_device(device)
    if (training := find_training_checkpoint(directory)) is not None:
        return _load_training(training, target, wanted, parallel, compat, allow_non_finite)
    return _load_released(directory, target, wanted, parallel, compat, allow_non_finite)


def save_pretrained(
    model: ParrotForConditionalGeneration,
    processor: ParrotProcessor,
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    overwrite: bool = False,
) -> None:
    """Write the released layout: what a released checkpoint held besides the model goes out again, bit for bit.

    Args:
        model: from `load_pretrained`.
        processor: written when the model does not come from a released checkpoint, whose own files are copied.
        path: directory to create.
        dtype: of the tensors; None keeps what they are.
        overwrite: replace an existing directory.

    Raises:
        CheckpointError: `path` exists.
    """
    from parrot_sys.systems.export import export_released

    export_released(
        model.model,
        path,
        source=model.source,
        save_processor=processor.save_pretrained if model.source is None else None,
        dtype=platform.parse_dtype(dtype) if isinstance(dtype, str) else dtype,
        overwrite=overwrite,
    )


def released_config(directory: Path) -> tuple[ParrotConfig, torch.dtype]:
    """Configuration and the widest floating-point dtype of a released-layout checkpoint.

    Raises:
        CheckpointError, ConfigError: as `load_pretrained`.
    """
    hf = read_json(directory / CONFIG)
    config = config_from_hf(hf, directory)
    with TensorFiles(directory) as files:
        keys = files.names()
        dtypes = {dtype for dtype in map(files.dtype, keys) if dtype.is_floating_point}
    widest = torch.float32
    for index, dtype in enumerate(sorted(dtypes, key=str)):
        widest = dtype if index == 0 else torch.promote_types(widest, dtype)
    return config, widest


def _load_released(
    directory: Path,
    device: torch.device,
    dtype: torch.dtype | None,
    parallel: ParallelConfig | None,
    compat: Compat | None,
    allow_non_finite: bool,
) -> tuple[ParrotForConditionalGeneration, ParrotProcessor]:
    config, stored = released_config(directory)
    config = config.with_compat(compat)
    processor = ParrotProcessor.from_pretrained(directory)
    processor.check_fits(config.llm.vocab_size, config.vision.image_size, directory, tiling=config.tiling)
    from parrot_sys.systems.build import build_model
    from parrot_sys.systems.export import ReleasedSource
    from parrot_sys.systems.load import bypassed_parts, load_released

    parallel = _initialize(parallel)
    model = build_model(
        config,
        parallel,
        dtype=dtype or stored,
        device=device,
        initialize_weights=False,
        bypass=bypassed_parts(directory, config),
    )
    load_released(model, directory, allow_non_finite=allow_non_finite)
    source = ReleasedSource(directory=directory.resolve(), hf=read_json(directory / CONFIG), keep_dtypes=dtype is None)
    return _ready(model, processor, directory, source), processor


def _load_training(
    directory: Path,
    device: torch.device,
    dtype: torch.dtype | None,
    parallel: ParallelConfig | None,
    compat: Compat | None,
    allow_non_finite: bool,
) -> tuple[ParrotForConditionalGeneration, ParrotProcessor]:
    config = load_config(ParrotConfig, directory / MODEL_CONFIG).with_compat(compat)
    processor = ParrotProcessor.from_pretrained(directory / PROCESSOR)
    processor.check_fits(config.llm.vocab_size, config.vision.image_size, directory / PROCESSOR, tiling=config.tiling)
    from parrot_sys.megatron.checkpoint.store import load_model_weights
    from parrot_sys.megatron.state_dict import refuse_non_finite, stored_dtype
    from parrot_sys.systems.build import build_model

    parallel = _initialize(parallel)
    train = read_yaml(directory / TRAIN_CONFIG) if (directory / TRAIN_CONFIG).is_file() else {}
    model = build_model(
        config,
        parallel,
        dtype=dtype or stored_dtype(directory),
        device=device,
        initialize_weights=False,
        bypass=saved_bypass(train, config),
    )
    load_model_weights(directory, [model])
    refuse_non_finite([model], directory, allow=allow_non_finite)
    return _ready(model, processor, directory / PROCESSOR), processor


def _initialize(parallel: ParallelConfig | None) -> ParallelConfig:
    from parrot_sys.engine.lockstep import inference_layout
    from parrot_sys.megatron.runtime.initialize import initialize

    return initialize(inference_layout(parallel))


def _ready(
    model: MultimodalModel, processor: ParrotProcessor, directory: Path, source: ReleasedSource | None = None
) -> ParrotForConditionalGeneration:
    """The model object, for inference; `directory` holds the tokenizer."""
    from parrot_sys.inference.model import ParrotForConditionalGeneration
    from parrot_sys.systems.build import config_of

    if model.vision_tower is not None:
        model.vision_tower.requires_grad_(False)
    config = config_of(model)
    eos, pad = _special_tokens(directory, processor, config.llm.vocab_size)
    # (Only text that guides the experts ends where an answer begins.)
    guided = config.moe.num_experts > 0
    header = processor.tokenizer.encode(processor.template.answer_header, add_special_tokens=False) if guided else []
    wrapper = ParrotForConditionalGeneration(
        model, eos_token_ids=eos, pad_token_id=pad, answer_header=header, source=source
    )
    return wrapper.eval()


def _special_tokens(directory: Path, processor: ParrotProcessor, vocab_size: int) -> tuple[list[int], int | None]:
    """Ids that end an answer (generation_config.json and the tokenizer's) and the padding id."""
    file = directory / "generation_config.json"
    named = Fields(read_json(file) if file.is_file() else None, file)
    ends = named.items("eos_token_id", int) if isinstance(named.values.get("eos_token_id"), list) else []
    if not ends and (end := named.get("eos_token_id", int)) is not None:
        ends = [end]
    if not all(0 <= end < vocab_size for end in ends):
        raise named.wrong("eos_token_id", f"ids below {vocab_size} (vocab_size)")
    if isinstance(processor.tokenizer, MissingTokenizer):
        return ends, Fields(read_json(directory / CONFIG), directory / CONFIG).get("pad_token_id", int)
    if (own := processor.tokenizer.eos_token_id) is not None and own not in ends:
        ends.append(own)
    return ends, processor.tokenizer.pad_token_id
