"""Tables of invented questions for other people's evaluation kits."""

from __future__ import annotations

from pathlib import Path

from tests.evaluation.tables import picture, write_table

MODEL = Path(__file__).parents[1] / "fixtures" / "parrot_tiny" / "model"
NEW_TOKENS = 8
OPTIONS = {"A": "e", "B": "z" * 12, "C": "q" * 12, "D": "x" * 12}
"""An answer names A where it holds its one letter, and no other option ever."""


def table(path: Path, rows: int = 6) -> Path:
    """A table whose right answers are A and B in turn."""
    return write_table(
        path,
        [
            {
                "index": index,
                "question": f"What is in picture {index}?",
                **OPTIONS,
                "answer": "AB"[index % 2],
                "category": "one",
                "image": picture((40 * index, 200 - 30 * index, 9), (12 + index, 9)),
            }
            for index in range(rows)
        ],
    )
