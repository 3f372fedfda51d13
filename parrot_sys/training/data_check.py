"""`parrot data check`: whether training would start with some record files, and what is in them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from tqdm import tqdm

from parrot_sys.cli import parse_config
from parrot_sys.data.check import CheckSetup, Pictures, check_files
from parrot_sys.data.check_report import CheckReport, FileReport, render
from parrot_sys.data.config import DataConfig
from parrot_sys.data.mixture import Group, mixed
from parrot_sys.data.sources.registry import open_source
from parrot_sys.data.tokenizer_files import MissingTokenizer
from parrot_sys.errors import ConfigError, ParrotError
from parrot_sys.paths import INPUT
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.training.config import TrainConfig
from parrot_sys.training.record_setup import StartConfig, model_and_processor

DESCRIPTION = """Reads record files once and reports what is in them and what training would stop at, leave out or
change: wrong records, markers, pictures, answers lost to max_seq_len, control tokens in texts, ids beyond the
vocabulary, languages, duplicates. Exit code 0 if `parrot train` would start with them and not stop at one of their
records, 1 if not, 2 for a wrong command line.

Give the settings of the run (--config, --model..., --data..., --checkpoint.load-from) as to `parrot train`; settings
that do not matter here are left out. Without a tokenizer lengths and ids are not checked.

  $ parrot data check a.json b.jsonl --config parrot_7b --config parrot_instruct --model.tokenizer-path qwen
  $ parrot data check a.json --checkpoint.load-from runs/first/hf --data.on-bad-sample skip --json > report.json"""


@dataclass(kw_only=True, frozen=True, slots=True)
class DataCheckConfig:
    """Checks record files."""

    files: Annotated[tyro.conf.Positional[tuple[str, ...]], INPUT] = ()
    """Data sets; data.paths when none is given."""
    model: ParrotConfig = field(default_factory=ParrotConfig)
    """Sizes and options of the model."""
    data: DataConfig = field(default_factory=DataConfig)
    """Records, images and packing."""
    checkpoint: StartConfig = field(default_factory=StartConfig)
    """Weights that training starts from."""
    pictures: Pictures = "decode"
    """`decode` reads every picture whole, as training does; `header` reads its size and mode; `skip` only looks whether
    it is there."""
    json: bool = False
    """Print the report as JSON."""

    def __post_init__(self) -> None:
        if not self.files and not self.data.paths:
            raise ConfigError("name at least one record file: parrot data check FILE ...")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `parrot data check`; 0 if training would start."""
    config = parse_config(
        DataCheckConfig, argv, prog="parrot data check", description=DESCRIPTION, leave_out=TrainConfig
    )
    report = check(config)
    print(json.dumps(report.plain(), indent=1) if config.json else render(report))
    return 1 if report.reasons else 0


def check(config: DataCheckConfig) -> CheckReport:
    """The report on the files of a configuration."""
    data = replace(config.data, paths=config.files) if config.files else config.data
    setup, problems = _setup(config, data)
    total = sum(_size(source.path) for source in data.sources())
    with tqdm(total=total, desc="check", unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:

        def advance(read: int) -> None:
            bar.update(read)

        report = check_files(setup, advance)
    report.reasons += [*problems, *_reasons(report, setup)]
    if setup.processor is None:
        report.not_checked.append(
            "rows, lost answers and ids: set --model.tokenizer-path, or --checkpoint.load-from a model"
        )
    if config.pictures != "decode":
        report.not_checked.append("whether pictures can be decoded (--pictures decode)")
    return report


def _size(path: Path) -> int:
    """Bytes of a data set; 0 where it is missing, which the report says."""
    try:
        return open_source(path).size()
    except ParrotError:
        return 0


def _setup(config: DataCheckConfig, data: DataConfig) -> tuple[CheckSetup, list[str]]:
    """Settings to check against, and faults already found on the model's side."""
    model, start = config.model, config.checkpoint.load_from
    processor, problems = None, []
    try:
        model, processor = model_and_processor(model, start)
        if processor is not None:
            processor = processor.with_data_config(data).with_tiling(model.tiling)
            processor.encode_text("")  # a checkpoint may hold no tokenizer
            where = model.tokenizer_path or start
            processor.check_fits(model.llm.vocab_size, model.vision.image_size, where, tiling=model.tiling)
    except ParrotError as error:
        problems.append(str(error))
        if processor is not None and isinstance(processor.tokenizer, MissingTokenizer):
            processor = None
    setup = CheckSetup(
        data=data,
        processor=processor,
        num_visual_rows=model.rows_per_image,
        max_seq_len=model.max_seq_len,
        vocab_size=model.llm.vocab_size,
        pictures=config.pictures,
    )
    return setup, problems


def _reasons(report: CheckReport, setup: CheckSetup) -> Iterator[str]:
    """Why training would not start, or would stop at a record."""
    data = setup.data
    for file in report.files:
        yield from _reasons_of_file(file, data)
    capacity = setup.max_seq_len if data.max_tokens_per_micro_batch is None else data.max_tokens_per_micro_batch
    if (longest := max((file.longest for file in report.files), default=0)) > capacity:
        yield f"data.max_tokens_per_micro_batch={capacity} does not hold the longest sample of {longest} rows"
    kinds: Any = sum((file.kinds.counts for file in report.files), start=type(report.duplicates.counts)())
    for kind in ("text only", "with images"):
        if data.text_ratio is not None and not kinds[kind]:
            yield f"data.text_ratio={data.text_ratio} needs samples with and without images, got none of {kind}"
    yield from _reasons_of_mix(report, data)


def _reasons_of_mix(report: CheckReport, data: DataConfig) -> Iterator[str]:
    names = [source.name for source in data.sources()]
    groups = [
        Group(np.arange(count), 1.0, data_set=name, language=language)
        for name, file in zip(names, report.files, strict=True)
        for language, count in file.languages.counts.items()
    ]
    for step, mix in data.mixes() if groups else ():
        try:
            mix.check(names, [(group.data_set, group.language) for group in groups])
        except ConfigError as error:
            yield str(error)
        if not sum(group.count for group in mixed(groups, mix)):
            yield f"data.weights, data.language_weights and caps leave no sample in an epoch from step {step} on"


def _reasons_of_file(file: FileReport, data: DataConfig) -> Iterator[str]:
    if file.unreadable is not None:
        yield file.unreadable
        return
    if file.bad.total and data.on_bad_sample == "error":
        first = next(iter(file.bad.examples.values()))[0]
        yield f"{file.path}: {file.bad.total} bad records under data.on_bad_sample=error, the first: {first}"
    if file.long.total and data.on_long_sample == "error":
        yield f"{file.path}: {file.long.total} samples are too long under data.on_long_sample=error"
    if not file.usable:
        yield f"{file.path} has no usable record"
