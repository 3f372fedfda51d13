"""The tiny released-layout checkpoint and helpers that write data sets."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parrot_sys.data.loader import ParrotDataLoader
from parrot_sys.data.processor import ParrotProcessor
from tests.data.comparing import ROWS


@pytest.fixture(scope="session")
def parrot_tiny() -> Path:
    return Path(__file__).parents[1] / "fixtures" / "parrot_tiny"


@pytest.fixture(scope="session")
def expected(parrot_tiny: Path) -> dict[str, Any]:
    return json.loads((parrot_tiny / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def processor(parrot_tiny: Path) -> ParrotProcessor:
    return ParrotProcessor.from_pretrained(parrot_tiny / "model")


def conversation(question: str = "What is it?", answer: str = "A cat.") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture(scope="session")
def turns() -> Callable[..., list[dict[str, str]]]:
    return conversation


@pytest.fixture
def write_records(tmp_path: Path) -> Callable[..., str]:
    def write(records: list[Any], name: str = "set.json") -> str:
        path = tmp_path / name
        if name.endswith(".jsonl"):
            path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
        else:
            path.write_text(json.dumps(records), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def images(parrot_tiny, tmp_path):
    for i in range(4):
        shutil.copy(parrot_tiny / f"image_{i}.png", tmp_path)
    return [f"image_{i}.png" for i in range(4)]


@pytest.fixture
def records(images, turns):
    """Twenty records of several lengths: text only, one image, two images."""
    result = []
    for i in range(20):
        count = i % 3
        question = "<image>\n" * count + "What is it? " * (1 + i % 5)
        names = {0: None, 1: images[i % 4], 2: [images[i % 4], images[(i + 1) % 4]]}[count]
        result.append(
            {
                "id": f"r{i}",
                "image": names,
                "lang": ["en", "pt"][i % 4 == 0],
                "conversations": turns(question, f"Answer {i}."),
            }
        )
    return result


@pytest.fixture
def make_loader(processor):
    def make(config, *, batch=6, rank=0, ranks=1, limit=512, rows=ROWS, **options):
        return ParrotDataLoader(
            config,
            processor,
            num_visual_rows=rows,
            max_seq_len=limit,
            global_batch_size=batch,
            dp_rank=rank,
            dp_size=ranks,
            **options,
        )

    return make
