"""Three small tables for the tests of the runner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.tables import picture, write_table

WORDS = {"en": ["cat", "dog"], "cn": ["猫", "狗"], "pt": ["gato", "cão"]}


@pytest.fixture
def three_languages(tmp_path: Path) -> Path:
    """Three languages, two splits, four questions of which two have a rotation, one shared picture."""
    for suffix, words in WORDS.items():
        rows: list[dict[str, Any]] = [
            {"index": 1, "answer": "A", "split": "style", "category": "x", "image": picture((9, 9, 9), (30, 30))},
            {"index": 2, "answer": "B", "split": "style", "category": "y", "image": 1},
            {"index": 3, "answer": "B", "split": "concept", "category": "x", "image": 1},
            {"index": 4, "answer": "A", "split": "concept", "category": "x", "image": 1},
            {"index": 1_000_001, "answer": "B", "split": "style", "category": "x", "image": 1},
            {"index": 1_000_003, "answer": "A", "split": "concept", "category": "x", "image": 1},
        ]
        options = dict(zip("AB", words, strict=True))
        write_table(
            tmp_path / "data" / f"mmmb_{suffix}.tsv", [{"question": f"{suffix}?", **options, **r} for r in rows]
        )
    return tmp_path / "data"
