"""`parrot data index`: builds the indexes that training maps, before it starts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from parrot_sys.cli import parse_config
from parrot_sys.data.config import DataConfig
from parrot_sys.data.index.access import IndexPlace, load_index
from parrot_sys.data.remote.storage import RemoteStorage
from parrot_sys.data.sources.registry import open_source
from parrot_sys.errors import ConfigError
from parrot_sys.logging import setup_logging
from parrot_sys.paths import INPUT, OUTPUT_FOLDER
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.training.config import TrainConfig
from parrot_sys.training.record_setup import StartConfig, model_and_processor

DESCRIPTION = """Builds the index of each data set: records are read, checked and tokenised once, in several processes,
and training maps the result into memory. A build that was interrupted goes on where it stopped; an index that is there
already is kept, unless its data set has changed. `parrot train` builds what is missing by itself.

Give the settings of the run that decide how texts are read (--config, --model..., --data..., --checkpoint.load-from)
as to `parrot train`, and there --data.index-dir DIR.

  $ parrot data index a.json b.jsonl --output DIR --config parrot_7b --config parrot_instruct \\
        --model.tokenizer-path qwen
  $ parrot train ... --data.paths a.json b.jsonl --data.index-dir DIR"""


@dataclass(kw_only=True, frozen=True, slots=True)
class DataIndexConfig:
    """Indexes data sets."""

    files: Annotated[tyro.conf.Positional[tuple[str, ...]], INPUT] = ()
    """Data sets; data.paths when none is given."""
    output: Annotated[str | None, OUTPUT_FOLDER] = None
    """Folder for the indexes; data.index_dir when it is not given."""
    workers: int | None = None
    """Processes (default: one a core)."""
    model: ParrotConfig = field(default_factory=ParrotConfig)
    """Tokenizer and template of the model."""
    data: DataConfig = field(default_factory=DataConfig)
    """Records and how their texts are read."""
    checkpoint: StartConfig = field(default_factory=StartConfig)
    """Weights that training starts from."""

    def __post_init__(self) -> None:
        if not self.files and not self.data.paths:
            raise ConfigError("name at least one data set: parrot data index FILE ... --output DIR")
        if self.output is None and self.data.index_dir is None:
            raise ConfigError("output must name a folder for the indexes: --output DIR")
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"workers must be >= 1, got {self.workers}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `parrot data index`; 0 when every data set has its index."""
    config = parse_config(
        DataIndexConfig, argv, prog="parrot data index", description=DESCRIPTION, leave_out=TrainConfig
    )
    setup_logging()
    data = replace(config.data, paths=config.files) if config.files else config.data
    _, processor = model_and_processor(config.model, config.checkpoint.load_from)
    if processor is None:
        raise ConfigError("a tokenizer is needed: set --model.tokenizer-path, or --checkpoint.load-from a model")
    processor = processor.with_data_config(data)
    place = IndexPlace(folder=Path(config.output or data.index_dir or ""), is_chosen=True)
    for source in data.sources():
        start = time.monotonic()
        source.fetch(RemoteStorage(data.remote, data.cache_dir))
        index = load_index(open_source(source.path), processor, place, workers=config.workers)
        print(
            f"{index.folder}: {len(index):,} records of {source.path}, {len(index.problem_numbers):,} of them wrong "
            f"({time.monotonic() - start:.1f} s)"
        )
    return 0
