"""`parrot convert`: between training checkpoints and the released Hugging Face layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from parrot_sys.config_values import save_config
from parrot_sys.data.constants import IMAGE_TOKEN
from parrot_sys.data.tokenizer_files import MissingTokenizer
from parrot_sys.errors import CheckpointError
from parrot_sys.inference.pretrained import load_pretrained, save_pretrained
from parrot_sys.models.checkpoint_files import MODEL_CONFIG, PROCESSOR
from parrot_sys.models.tensor_files import check_absent, new_directory
from parrot_sys.paths import INPUT_FILE, INPUT_FOLDER, NEW_FOLDER, check_outputs
from parrot_sys.platform import DtypeName
from parrot_sys.staging import scratch_directory

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
  $ parrot convert --checkpoint runs/lora --output tuned --merge-lora
  $ parrot convert --source-format multimodal_gpt --llm llama-7b --flamingo OpenFlamingo-9B/checkpoint.pt \\
        --lora mmgpt-lora-v0-release.pt --vision clip-vit-large-patch14 --output mmgpt"""


@dataclass(kw_only=True, frozen=True, slots=True)
class ConvertConfig:
    """Settings of a conversion: its input and its output."""

    output: Annotated[Path, NEW_FOLDER, tyro.conf.arg(metavar="DIR")]
    """Directory to create; it appears only when everything is in it."""
    checkpoint: Annotated[Path | None, INPUT_FOLDER, tyro.conf.arg(metavar="DIR")] = None
    """Checkpoint to read, with --source-format auto."""
    source_format: Literal["auto", "multimodal_gpt"] = "auto"
    """`auto`: one directory, whatever it is; `multimodal_gpt`: the files that MultiModal-GPT was released as."""
    llm: Annotated[Path | None, INPUT_FOLDER, tyro.conf.arg(metavar="DIR")] = None
    """multimodal_gpt: LLaMA in Hugging Face layout."""
    flamingo: Annotated[Path | None, INPUT_FILE, tyro.conf.arg(metavar="FILE")] = None
    """multimodal_gpt: OpenFlamingo's resampler and gated blocks (.pt)."""
    lora: Annotated[Path | None, INPUT_FILE, tyro.conf.arg(metavar="FILE")] = None
    """multimodal_gpt: weights and settings of MultiModal-GPT's training (.pt); without it OpenFlamingo is converted."""
    vision: Annotated[Path | None, INPUT_FOLDER, tyro.conf.arg(metavar="DIR")] = None
    """multimodal_gpt: CLIP ViT-L/14 in Hugging Face layout."""
    image_token_id: int | None = None
    """multimodal_gpt: id of <image>, when --llm holds no tokenizer (else the second one after LLaMA's own)."""
    vocab_multiple: int = 1
    """multimodal_gpt: fill the embedding up to a multiple of this; its 32003 tokens cannot be cut over ranks."""
    format: Literal["hf", "megatron"] = "hf"
    """`hf`: released layout, for other people's tools; `megatron`: a training checkpoint (weights, no optimizer)."""
    dtype: DtypeName | None = None
    """Type of the tensors; as they are in the checkpoint when not given."""
    allow_non_finite: bool = False
    """Load NaN and infinite weights with a warning; otherwise they are an error that names their tensors."""
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
    check_outputs(config)
    _check_sources(config)
    if config.source_format == "auto":
        assert config.checkpoint is not None, "checked"
        _convert(config, config.checkpoint)
        return
    if config.format == "hf" and config.dtype is None and not config.merge_lora:
        _assemble(config, config.output)
        return
    with scratch_directory(config.output) as folder:
        whole = folder / "released"
        _assemble(config, whole)
        _convert(config, whole)


def _check_sources(config: ConvertConfig) -> None:
    """
    Raises:
        CheckpointError: sources are missing, of the other format, or overlap the output.
    """
    parts = {name: getattr(config, name) for name in ("llm", "flamingo", "lora", "vision")}
    wanted = {"checkpoint": config.checkpoint} if config.source_format == "auto" else parts
    other = parts if config.source_format == "auto" else {"checkpoint": config.checkpoint}
    missing = [f"--{name}" for name, path in wanted.items() if path is None and name != "lora"]
    foreign = [f"--{name}" for name, path in other.items() if path is not None]
    if missing or foreign:
        raise CheckpointError(
            f"--source-format {config.source_format} needs {' '.join(f'--{name}' for name in wanted)}: "
            + "; ".join(
                [f"missing are {', '.join(missing)}"] * bool(missing)
                + [f"{', '.join(foreign)} belong to the other format"] * bool(foreign)
            )
        )
    if config.vocab_multiple < 1:
        raise CheckpointError(f"vocab-multiple must be >= 1, got {config.vocab_multiple}")
    target = config.output.resolve()
    for name, path in wanted.items():
        source = None if path is None else path.resolve()
        if source is not None and (source.is_relative_to(target) or target.is_relative_to(source)):
            raise CheckpointError(f"output must lie outside the {name} {path}, got {config.output}")


def _assemble(config: ConvertConfig, output: Path) -> None:
    """MultiModal-GPT's files as one directory."""
    from parrot_sys.data.tokenizer_files import with_added_tokens
    from parrot_sys.systems.multimodal_gpt.assemble import ADDED_TOKENS, MultimodalGptFiles, assemble

    assert config.llm is not None, "checked"
    assert config.flamingo is not None, "checked"
    assert config.vision is not None, "checked"
    files = MultimodalGptFiles(llm=config.llm, flamingo=config.flamingo, lora=config.lora, vision=config.vision)
    tokenizer = with_added_tokens(config.llm, ADDED_TOKENS)
    settings: dict[str, Any] = {"image_token_id": config.image_token_id}
    if tokenizer is not None:
        settings = {
            "num_tokens": len(tokenizer),
            "image_token_id": tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            "save_tokenizer": tokenizer.save_pretrained,
        }
    assemble(
        files,
        output,
        vocab_multiple=config.vocab_multiple,
        overwrite=config.force,
        allow_non_finite=config.allow_non_finite,
        **settings,
    )


def _convert(config: ConvertConfig, checkpoint: Path) -> None:
    model, processor = load_pretrained(checkpoint, dtype=config.dtype, allow_non_finite=config.allow_non_finite)
    if config.format == "megatron" and isinstance(processor.tokenizer, MissingTokenizer):
        raise CheckpointError(
            "--format megatron makes a checkpoint to train on, which needs a tokenizer, but "
            f"{config.llm or checkpoint} holds none: put tokenizer.json or tokenizer.model there"
        )
    if config.merge_lora:
        _merge_lora(model)
    if config.format == "hf":
        save_pretrained(model, processor, config.output, dtype=config.dtype, overwrite=config.force)
        return
    with new_directory(config.output, overwrite=config.force) as target:
        _save_training_checkpoint(model, processor, target, config.vision)


def _merge_lora(model: ParrotForConditionalGeneration) -> None:
    from parrot_sys.megatron.lora import merge_lora

    if model.config.lora is None:
        raise CheckpointError("merge-lora needs a checkpoint with LoRA, but this one has none: leave the option out")
    merge_lora(model.model)


def _save_training_checkpoint(
    model: ParrotForConditionalGeneration, processor: ParrotProcessor, directory: Path, tower: Path | None
) -> None:
    from parrot_sys.megatron.checkpoint.store import begin_save

    settings = model.config
    if tower is not None:  # what was put together lies in a place that goes away; the tower stays where it came from
        settings = replace(settings, vision=replace(settings.vision, path=str(tower.resolve())))

    def add_files() -> None:
        save_config(settings, directory / MODEL_CONFIG)
        processor.save_pretrained(directory / PROCESSOR)

    begin_save(directory, [model.model], None, {"step": 0, "world_size": 1}).complete(add_files)
