"""The tiny released-layout checkpoint and helpers that write data sets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parrot_sys.data.processor import ParrotProcessor


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
