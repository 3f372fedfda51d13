"""Helpers of the tests of indexes: data sets, and the batches that a path without an index would give."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from parrot_sys.data.config import DataConfig
from parrot_sys.data.index.access import IndexPlace, load_index
from parrot_sys.data.index.record_index import RecordIndex
from parrot_sys.data.loader import ParrotDataLoader
from parrot_sys.data.mixture import Group, epoch_order
from parrot_sys.data.packing import Sample, expanded_lengths, pack_samples, plan_micro_batches, remaining_labels
from parrot_sys.data.record_files import read_raw_records
from parrot_sys.data.records import Record, parse_record
from parrot_sys.data.sources.registry import open_source
from parrot_sys.errors import DataError

ROWS, LIMIT = 17, 150
WORDS = ("cat", "dog", "猫", "gato", "<|im_end|>", "кот", "the")


def make_records(count: int, seed: int, pictures: Sequence[str], *, wrong: bool = False) -> list[dict[str, Any]]:
    """Records of all shapes that training takes; with `wrong` some that it does not."""
    draw = random.Random(seed)
    records = []
    for i in range(count):
        images = [draw.choice(pictures) for _ in range(draw.choice((0, 1, 1, 2)))] if pictures else []
        turns = []
        for turn in range(draw.randint(1, 3)):
            words = " ".join(draw.choices(WORDS, k=draw.randint(1, 30)))
            question = "<image>\n" * len(images) + words if turn == 0 else words
            answer = "" if wrong and draw.random() < 0.1 else " ".join(draw.choices(WORDS, k=draw.randint(1, 20)))
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        if draw.random() < 0.2:
            turns.insert(0, {"from": "system", "value": "Be kind."})
        record: dict[str, Any] = {"conversations": turns}
        if draw.random() < 0.8:
            record["id"] = draw.choice((i, f"r{i}"))
        if draw.random() < 0.7:
            record["lang"] = draw.choice(("en", "", "zh"))
        if images:
            record["image"] = images
        records.append(record)
    return records


def write(path: Path, records: Sequence[Any]) -> str:
    """A JSON list, or JSON lines where the name says so."""
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]", encoding="utf-8")
    return str(path)


def plain_batches(
    config: DataConfig, processor: Any, *, batch: int, rank: int, ranks: int, epoch: int
) -> Iterator[list[Any]]:
    """Micro-batches of one rank in one epoch, from records that are all in memory: what the loader's have to equal."""
    samples: list[tuple[Record, Any, Any]] = []
    rows: list[int] = []
    groups: dict[tuple[int, str], list[int]] = {}
    for number, source in enumerate(config.sources()):
        for index, raw in enumerate(read_raw_records(source.path)):
            try:
                record = parse_record(raw, index, source.path, language=source.language)
            except DataError:
                continue
            ((ids, labels),) = processor.encode([processor.render(record.turns)])
            if remaining_labels(ids, labels, ROWS, LIMIT):
                groups.setdefault((number, record.language), []).append(len(samples))
                samples.append((record, ids, labels))
                rows.append(expanded_lengths(ids, ROWS, LIMIT)[0])
    weighted = [
        Group(np.array(members), config.sources()[number].weight * config.language_weights.get(language, 1.0))
        for (number, language), members in sorted(groups.items())
    ]
    order = epoch_order(weighted, config.seed, epoch)
    owner = np.repeat(range(len(config.paths)), [len(g) for g in _by_set(groups, len(config.paths))])
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        plan = plan_micro_batches(np.array(rows)[chosen], LIMIT, ranks)[rank]
        yield [
            pack_samples(
                [_sample(config, processor, int(owner[chosen[i]]), *samples[chosen[i]]) for i in micro_batch],
                num_visual_rows=ROWS,
                max_seq_len=LIMIT,
            )
            for micro_batch in plan
        ]


def _by_set(groups: dict[tuple[int, str], list[int]], count: int) -> list[list[int]]:
    return [[i for (number, _), members in groups.items() if number == each for i in members] for each in range(count)]


def _sample(config: DataConfig, processor: Any, number: int, record: Record, ids: Any, labels: Any) -> Sample:
    source = config.sources()[number]
    files = [source.image_root / name for name in record.images]
    return Sample(
        input_ids=ids,
        labels=labels,
        pixel_values=processor.images(files) if files else None,
        language=record.language,
        record_id=f"{source.name}:{record.record_id}",
    )


def same_batch(one: Any, other: Any) -> None:
    """Equal in every field, to the bit."""
    for name in one.__dataclass_fields__:
        a, b = getattr(one, name), getattr(other, name)
        if isinstance(a, torch.Tensor):
            assert isinstance(b, torch.Tensor), name
            assert a.dtype == b.dtype, name
            assert torch.equal(a, b), name
        else:
            assert a == b, name


def make_loader(config: DataConfig, processor: Any, *, batch: int = 6, rank: int = 0, ranks: int = 1, **options: Any):
    """A loader of the sizes that `plain_batches` has."""
    return ParrotDataLoader(
        config,
        processor,
        num_visual_rows=ROWS,
        max_seq_len=LIMIT,
        global_batch_size=batch,
        dp_rank=rank,
        dp_size=ranks,
        **options,
    )


def index_of(processor: Any, path: str | Path, folder: Path, **options: Any) -> RecordIndex:
    """The index of a data set, of the sizes of the other helpers."""
    return load_index(open_source(Path(path)), processor, IndexPlace(folder=folder, is_chosen=True), **options)


def facts(index: RecordIndex) -> dict[str, Any]:
    """Everything that an index says, to compare."""
    names = ("places", "tokens", "markers", "runs", "run_ends", "turns", "digests", "flags", "picture_ends")
    arrays = {name: getattr(index, name).tolist() for name in (*names, "problem_numbers")}
    spoken = [None if i == 0 else index.languages[i - 1] for i in index.spoken.tolist()]
    shown = [index.pictures_of(i) for i in range(len(index))]
    return arrays | {"spoken": spoken, "shown": shown, "ids": [*index.ids], "problems": [*index.problems]}
