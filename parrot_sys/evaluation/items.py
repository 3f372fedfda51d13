"""One question for the model, its answer, and what answers: shared by whoever asks and whoever scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from parrot_sys.data.constants import IMAGE_TOKEN
from parrot_sys.data.parts import human_turn
from parrot_sys.evaluation.tsv import Question, QuestionSet

Routing = Literal["model", "off", "other-language"]
Mode = Literal["generate", "likelihood", "text-likelihood"]
Options = Literal["shown", "hidden"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One question for the model."""

    table: QuestionSet
    question: Question
    prompt: str
    """Last user turn, with its image marker if there is a picture."""
    guidance_prompt: str | None = None
    """The same question in another language: its text decides the route (`other-language` only)."""
    problem: str = ""
    """Why it cannot be asked although its own row is in order."""

    def turns(self, prompt: str) -> list[dict[str, Any]]:
        """The conversation that `prompt` is the last turn of, after the earlier turns of the question.

        The picture's marker opens the prompt; any other one in question, options and history is text.
        """
        earlier = [
            turn
            for question, answer in self.question.history
            for turn in (human_turn(question), {"from": "gpt", "value": answer})
        ]
        if self.question.image_key is None:
            return [*earlier, human_turn(prompt)]
        return [*earlier, human_turn(prompt.removeprefix(f"{IMAGE_TOKEN}\n"), images=1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """The model's answer to one question."""

    response: str
    experts: list[float] = field(default_factory=list)
    """Routing weight of each expert; empty for a model without experts."""
    option_scores: dict[str, float] = field(default_factory=dict)
    """Letter -> log-likelihood (both likelihood modes only)."""
    option_tokens: dict[str, int] = field(default_factory=dict)
    """Letter -> tokens that its log-likelihood is the sum over (`text-likelihood` only)."""


class Predictor(Protocol):
    """A model that answers questions. `settings` holds plain values that decide the answers."""

    settings: Mapping[str, Any]
    has_experts: bool
    """Whether there are experts and they are used."""
    has_choice: bool
    """Whether there are several of them: of one expert every route is the same."""
    notes: Sequence[str]
    """Sentences on the model that belong into the report."""

    def problem(self, item: Item) -> str:
        """Why the model cannot be asked a question, empty where it can; every picture is decoded once for it."""
        ...

    def predict(self, items: Sequence[Item], routing: Routing) -> list[Prediction]:
        """One prediction per item."""
        ...

    def logit_change(self, items: Sequence[Item], routing: Routing) -> float:
        """Largest change of any next-token logit when the images are routed by `routing` and not by the model."""
        ...
