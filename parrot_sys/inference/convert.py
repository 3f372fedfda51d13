"""`parrot convert`: between training checkpoints and the released Hugging Face layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from parrot_sys.config_values import save_config
from parrot_sys.errors import CheckpointError
from parrot_sys.inference.pretrained import MODEL_CONFIG, PROCESSOR, load_pretrained, save_pretrained
from parrot_sys.models.tensor_files import check_absent, new_directory
from parrot_sys.platform import DtypeName

if TYPE_CHECKING:
    from parrot_sys.data.processor import ParrotProcessor
    from parrot_sys.inference.model import ParrotForConditionalGeneration

DESCRIPTION = """Turns a checkpoint into the released Hugging Face layout, or into a training checkpoint.

The input may be a directory in the released layout (config.json with model_type parrot_qwen2, safetensors or .bin,
sharded or not), a training checkpoint, or a training run, whose newest checkpoint is taken. Released to released writes
the same tensors bit for bit.

  $ parrot convert --checkpoint runs/demo --output parrot-demo-hf
  $ parrot convert --checkpoint Parrot-7B --output parrot-7b-bf16 --dtype bfloat16
  $ parrot convert --checkpoint Parrot-7B --output start --format megatron
  $ parrot convert --checkpoint runs/lora --output tuned --merge-lora"""


@dataclass(kw_only=True, frozen=True, slots=True)
class ConvertConfig:
    """What to convert, and into what."""

    checkpoint: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Checkpoint to read."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Directory to create; it appears only when everything is in it."""
    format: Literal["hf", "megatron"] = "hf"
    """`hf`: released layout, for other people's tools; `megatron`: a training checkpoint (weights, no optimizer)."""
    dtype: DtypeName | None = None
    """Type of the tensors; as they are in the checkpoint when not given."""
    merge_lora: bool = False
    """Make the updates of LoRA part of the weights, for programs that know no LoRA."""
    force: bool = False
    """Replace the output directory if it exists."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and convert; the exit code.

    Raises:
        CheckpointError: the input is unusable, or the output exists and --force is not given, is no checkpoint, or
            overlaps the input.
    """
    config = tyro.cli(ConvertConfig, args=argv, prog="parrot convert", description=DESCRIPTION)
    convert(config)
    print(f"wrote {config.output}")
    return 0


def convert(config: ConvertConfig) -> None:
    """Do what `config` says.

    Raises:
        CheckpointError: as `main`.
    """
    check_absent(config.output, overwrite=config.force)
    source, target = config.checkpoint.resolve(), config.output.resolve()
    if source.is_relative_to(target) or target.is_relative_to(source):
        raise CheckpointError(f"output must lie outside the checkpoint {config.checkpoint}, got {config.output}")
    model, processor = load_pretrained(config.checkpoint, dtype=config.dtype)
    if config.merge_lora:
        _merge_lora(model)
    if config.format == "hf":
        save_pretrained(model, processor, config.output, dtype=config.dtype, overwrite=config.force)
        return
    with new_directory(config.output, overwrite=config.force) as target:
        _save_training_checkpoint(model, processor, target)


def _merge_lora(model: ParrotForConditionalGeneration) -> None:
    from parrot_sys.megatron.lora import merge_lora

    if model.config.lora is None:
        raise CheckpointError("merge-lora needs a checkpoint with LoRA, but this one has none: leave the option out")
    merge_lora(model.model)


def _save_training_checkpoint(
    model: ParrotForConditionalGeneration, processor: ParrotProcessor, directory: Path
) -> None:
    from parrot_sys.megatron.checkpointing import begin_save

    def add_files() -> None:
        save_config(model.config, directory / MODEL_CONFIG)
        processor.save_pretrained(directory / PROCESSOR)

    begin_save(directory, [model.model], None, {"step": 0, "world_size": 1}).complete(add_files)
