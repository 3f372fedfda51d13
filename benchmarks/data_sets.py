"""Generated training records of any number, for the benchmarks of the data path.

Texts are words of the vendored vocabulary (six languages), as often as Zipf's law says, in sentences whose lengths are
log-normal, about 100 tokens a record with its template; 85% of the records have a picture, out of a small set that they
name again and again. A record depends on the seed and its number only.
"""

from __future__ import annotations

import io
import itertools
import json
import random
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from parrot_sys.data.corpora.default.concepts import load_concepts
from parrot_sys.data.corpora.default.train_tokenizer import train_tokenizer

LANGUAGES = {"en": 0.5, "zh": 0.14, "pt": 0.12, "ar": 0.08, "tr": 0.08, "ru": 0.08}
"""Share of the records in each language."""
WITH_PICTURE = 0.85
_PICTURES_IN_FOLDER = 1000
_WORDS = 4.5  # median of the words of a turn
_SPREAD = 0.75  # standard deviation of their logarithm
_Words = tuple[list[str], list[float]]
_BLOCK = 4096  # records whose sizes are drawn at once
_TOKENIZER_RECORDS = 20_000


def vocabulary() -> dict[str, list[str]]:
    """Language -> words of names and keywords, sorted."""
    concepts = load_concepts()
    words: dict[str, set[str]] = {language: set() for language in LANGUAGES}
    for language, known in words.items():
        for concept in concepts:
            known.update(concept.names[language].split(), *map(str.split, concept.keywords[language]))
    return {language: sorted(known) for language, known in words.items()}


def _weighted(words: Sequence[str]) -> _Words:
    """The words in an order of their own, with cumulative weights: the second comes half as often as the first."""
    order = random.Random(0).sample(words, len(words))
    return order, list(itertools.accumulate(1 / rank for rank in range(1, len(order) + 1)))


def records(count: int, *, pictures: int, seed: int = 0, start: int = 0) -> Iterator[dict[str, Any]]:
    """LLaVA records; number `start` onwards, a multiple of the block."""
    words = {language: _weighted(known) for language, known in vocabulary().items()}
    names, shares = list(LANGUAGES), list(LANGUAGES.values())
    for first in range(start, start + count, _BLOCK):
        generator = random.Random(f"{seed}:{first}")
        sizes = np.random.default_rng([seed, first]).lognormal(np.log(_WORDS), _SPREAD, (_BLOCK, 8))
        for number in range(first, min(first + _BLOCK, start + count)):
            (language,) = generator.choices(names, shares)
            turns = generator.choices((1, 2, 3, 4), (6, 3, 2, 1))[0]
            picture = generator.randrange(pictures) if generator.random() < WITH_PICTURE else None
            yield _record(number, language, words[language], sizes[number - first, : 2 * turns], picture, generator)


def _record(
    number: int, language: str, words: _Words, sizes: Any, picture: int | None, generator: random.Random
) -> dict[str, Any]:
    separator = "" if language == "zh" else " "
    turns = []
    for turn, size in enumerate(sizes.tolist()):
        count = 1 + int(size * (2.5 if turn % 2 else 1.0))  # answers are longer than questions
        text = separator.join(generator.choices(words[0], cum_weights=words[1], k=count))
        if turn % 2:
            turns.append({"from": "gpt", "value": f"{text}."})
        else:
            marker = "<image>\n" if turn == 0 and picture is not None else ""
            turns.append({"from": "human", "value": f"{marker}{text}?"})
    head: dict[str, Any] = {"id": f"generated-{number:08d}"}
    if picture is not None:
        head["image"] = picture_name(picture)
    return {**head, "lang": language, "conversations": turns}


def picture_name(number: int) -> str:
    """Name of a picture below the image root."""
    return f"{number // _PICTURES_IN_FOLDER:03d}/{number:06d}.jpg"


def write_records(path: Path, count: int, *, pictures: int, seed: int = 0) -> None:
    """A JSON list, or JSON lines where the name ends in .jsonl; written record by record."""
    lines = path.suffix == ".jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.write("" if lines else "[\n")
        for number, record in enumerate(records(count, pictures=pictures, seed=seed)):
            file.write(("" if lines or not number else ",\n") + json.dumps(record, ensure_ascii=False))
            file.write("\n" if lines else "")
        file.write("" if lines else "\n]\n")


def write_shards(folder: Path, entries: Sequence[Mapping[str, Any]], pictures: Path, *, shards: int) -> None:
    """The same records as WebDataset shards, each with its picture."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(shards):
        with tarfile.open(folder / f"shard-{number:03d}.tar", "w") as tar:
            for record in entries[number::shards]:
                plain = {key: value for key, value in record.items() if key != "image"}
                members = {"json": json.dumps(plain, ensure_ascii=False).encode()}
                if "image" in record:
                    members["jpg"] = (pictures / record["image"]).read_bytes()
                for ending, data in members.items():
                    info = tarfile.TarInfo(f"{record['id']}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def write_pictures(folder: Path, count: int, *, side: int, seed: int = 0) -> None:
    """Smooth coloured noise as JPEG, `side` pixels square, each another one."""
    for number in range(count):
        path = folder / picture_name(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng([seed, number]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(path, quality=90)


def write_tokenizer(folder: Path, *, vocab_size: int, seed: int = 1) -> int:
    """A byte-level BPE learned from such records, with Qwen2's special tokens; its number of entries."""
    sample = records(_TOKENIZER_RECORDS, pictures=1, seed=seed)
    texts = (turn["value"] for record in sample for turn in _turns(record))
    return train_tokenizer(itertools.chain(texts), vocab_size, folder)


def _turns(record: Mapping[str, Any]) -> Sequence[Mapping[str, str]]:
    return record["conversations"]
