"""A model that answers by a rule, and the settings of a run with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from parrot_sys.evaluation.items import Item, Prediction, Routing
from parrot_sys.evaluation.main import EvalConfig


class Scripted:
    """Answers by a rule and counts what it was asked."""

    def __init__(self, answer: Callable[[Item, Routing], str] | None = None, change: float = 1.0) -> None:
        self.answer = answer or (lambda item, routing: item.question.answer if routing == "model" else "A")
        self.change = change
        self.settings: Mapping[str, Any] = {"checkpoint": "abc", "mode": "generate"}
        self.has_experts = self.has_choice = True
        self.notes: Sequence[str] = ()
        self.asked: list[tuple[str, Routing, int]] = []
        self.guides: list[str | None] = []
        self.fail_after: int | None = None
        self.problems: dict[int, str] = {}

    def problem(self, item: Item) -> str:
        return self.problems.get(item.question.index, "")

    def predict(self, items: Sequence[Item], routing: Routing) -> list[Prediction]:
        if self.fail_after is not None and len(self.asked) >= self.fail_after:
            raise KeyboardInterrupt
        self.asked += [(item.table.language, routing, item.question.index) for item in items]
        self.guides += [item.guidance_prompt for item in items]
        weights = {"en": [0.5, 0.5], "zh": [0.25, 0.75], "pt": [1.0, 0.0]}
        return [Prediction(response=self.answer(item, routing), experts=weights[item.table.language]) for item in items]

    def run(self, program: Callable[[], int]) -> int:
        return program()

    def logit_change(self, items: Sequence[Item], routing: Routing) -> float:
        assert all((item.guidance_prompt is not None) == (routing == "other-language") for item in items)
        return self.change


def config(folder: Path, **more: Any) -> EvalConfig:
    values = {
        "checkpoint": folder.parent / "m",
        "data": (folder,),
        "output": folder.parent / "out",
        "batch_size": 2,
        **more,
    }
    return EvalConfig(**values)
