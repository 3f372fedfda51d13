"""Tiny copies of the data sets of lm-eval's text tasks, in their own formats and with invented questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORDS = ("red apple", "水果", "the small cat", "фрукт", "two dogs", "maçã", "1234", "sun")
LETTERS = "ABCD"


def _options(index: int) -> list[str]:
    return [WORDS[(index + step) % len(WORDS)] for step in (0, 3, 5, 6)]


def _arc(index: int) -> dict[str, Any]:
    choices = {"text": _options(index), "label": list(LETTERS)}
    return {"id": str(index), "question": f"What is {index}?", "choices": choices, "answerKey": LETTERS[index % 4]}


def _hellaswag(index: int) -> dict[str, Any]:
    return {
        "ind": index,
        "activity_label": "Cooking",
        "ctx_a": "Somebody takes a pan [step] and looks.",
        "ctx_b": f"she sees {index}",
        "ctx": "",
        "endings": _options(index),
        "label": str(index % 4),
    }


def _winogrande(index: int) -> dict[str, Any]:
    one, other = _options(index)[:2]
    sentence = f"The cat saw {index} but _ was too big for it."
    return {"sentence": sentence, "option1": one, "option2": other, "answer": str(index % 2 + 1)}


def _race(index: int) -> dict[str, Any]:
    problems = [
        {"question": f"Where is {step}?", "answer": LETTERS[(index + step) % 4], "options": _options(index + step)}
        for step in range(2)
    ]
    return {"article": f"A story of {index} cats.", "problems": str(problems)}


def _mmlu(index: int) -> dict[str, Any]:
    return {"question": f"How many are {index}?", "subject": "anatomy", "choices": _options(index), "answer": index % 4}


def _cmmlu(index: int) -> dict[str, Any]:
    options = dict(zip(LETTERS, _options(index), strict=True))
    return {"Question": f"{index} 是什么", **options, "Answer": LETTERS[index % 4]}


SETS: tuple[tuple[str, str, Any, tuple[str, ...]], ...] = (
    ("allenai/ai2_arc", "ARC-Easy", _arc, ("train", "validation", "test")),
    ("allenai/ai2_arc", "ARC-Challenge", _arc, ("train", "validation", "test")),
    ("Rowan/hellaswag", "default", _hellaswag, ("train", "validation")),
    ("allenai/winogrande", "winogrande_xl", _winogrande, ("train", "validation")),
    ("EleutherAI/race", "high", _race, ("test",)),
    ("cais/mmlu", "anatomy", _mmlu, ("dev", "test")),
    ("haonan-li/cmmlu", "agronomy", _cmmlu, ("dev", "test")),
)
"""Name of the data set, configuration, one row of it, splits."""
TASKS = ("arc_easy", "arc_challenge", "hellaswag", "winogrande", "race", "mmlu_anatomy", "cmmlu_agronomy")


def write_text_tasks(root: Path, *, rows: int = 7) -> Path:
    """Copies of all of them below `root`, as repositories are laid out; returns the folder."""
    cards: dict[str, str] = {}
    for name, configuration, row, splits in SETS:
        files = []
        for split in splits:
            file = root / name / configuration / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(row(index), ensure_ascii=False) for index in range(rows)]
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")
            files.append(f"  - split: {split}\n    path: {configuration}/{split}.jsonl\n")
        own = f"- config_name: {configuration}\n  data_files:\n{''.join(files)}"
        cards[name] = cards.get(name, "---\nconfigs:\n") + own
    for name, card in cards.items():
        (root / name / "README.md").write_text(f"{card}---\n", encoding="utf-8")
    return root
