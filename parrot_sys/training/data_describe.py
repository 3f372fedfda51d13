"""`parrot data describe`: the mix that training would really see."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from parrot_sys.cli import parse_config
from parrot_sys.data.config import DataConfig
from parrot_sys.data.loader import ParrotDataLoader
from parrot_sys.data.mix_report import plain_mix, plot_mix, render_mix
from parrot_sys.errors import ConfigError
from parrot_sys.logging import setup_logging
from parrot_sys.paths import INPUT, OUTPUT_FILE
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.training.config import TrainConfig
from parrot_sys.training.record_setup import StartConfig, model_and_processor

DESCRIPTION = """Reads the data sets through their indexes, as training does, and prints what an epoch takes of each
data set and language: samples, tokens (rows of text and images, cut to max_seq_len) and pictures; with a curriculum,
for each of its stages. Weights, temperature, caps and left-out records have had their effect.

Give the settings of the run (--config, --model..., --data..., --checkpoint.load-from) as to `parrot train`.

  $ parrot data describe a.json b.jsonl --config parrot_7b --model.tokenizer-path qwen --data.language-alpha 0.3
  $ parrot data describe --config mix.yaml --checkpoint.load-from runs/first/hf --plot mix.svg"""


@dataclass(kw_only=True, frozen=True, slots=True)
class DataDescribeConfig:
    """Describes the mix of data sets."""

    files: Annotated[tyro.conf.Positional[tuple[str, ...]], INPUT] = ()
    """Data sets; data.paths when none is given."""
    model: ParrotConfig = field(default_factory=ParrotConfig)
    """Tokenizer, template and sizes of the model."""
    data: DataConfig = field(default_factory=DataConfig)
    """Records and mix."""
    checkpoint: StartConfig = field(default_factory=StartConfig)
    """Weights that training starts from."""
    global_batch_size: int = 128
    """Samples of a step, for the steps of a curriculum."""
    plot: Annotated[Path | None, OUTPUT_FILE] = None
    """Also draw the shares into this file (.svg, .png, .pdf)."""
    json: bool = False
    """Print the numbers as JSON."""

    def __post_init__(self) -> None:
        if not self.files and not self.data.paths:
            raise ConfigError("name at least one data set: parrot data describe FILE ...")
        if self.data.stream.enabled:
            raise ConfigError("the mix of a stream is not known before training: unset data.stream.enabled")
        if self.plot is not None and self.plot.suffix not in (".svg", ".png", ".pdf"):
            raise ConfigError(f"plot must end in .svg, .png or .pdf, got {self.plot}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `parrot data describe`."""
    config = parse_config(
        DataDescribeConfig, argv, prog="parrot data describe", description=DESCRIPTION, leave_out=TrainConfig
    )
    setup_logging()
    data = replace(config.data, paths=config.files) if config.files else config.data
    model, processor = model_and_processor(config.model, config.checkpoint.load_from)
    if processor is None:
        raise ConfigError("a tokenizer is needed: set --model.tokenizer-path, or --checkpoint.load-from a model")
    loader = ParrotDataLoader(
        data,
        processor.with_data_config(data).with_tiling(model.tiling),
        num_visual_rows=model.rows_per_image,
        max_seq_len=model.max_seq_len,
        global_batch_size=config.global_batch_size,
    )
    rows = loader.mix()
    print(json.dumps(plain_mix(rows), indent=1, ensure_ascii=False) if config.json else render_mix(rows))
    if config.plot is not None:
        config.plot.parent.mkdir(parents=True, exist_ok=True)
        plot_mix(rows, config.plot)
    return 0
