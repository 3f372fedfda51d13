"""Held-out questions of the default data set as tables in MMMB's format, one per language, the pictures inside."""

from __future__ import annotations

import base64
import csv
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from parrot_sys.data.corpora.default.concepts import Concept
from parrot_sys.data.corpora.default.conversations import LETTERS, draw_distractors
from parrot_sys.data.corpora.default.phrases import phrases_in
from parrot_sys.data.corpora.default.pictures import openmoji_picture
from parrot_sys.data.languages import file_suffix

COLUMNS = ("index", "question", *LETTERS, "answer", "category", "l2-category", "split", "image")


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkQuestion:
    """One question, the same in every language: options are concepts in a fixed order."""

    split: Literal["style", "concept"]
    options: tuple[Concept, ...]
    answer: int
    """Position of the concept that the picture shows."""

    @property
    def concept(self) -> Concept:
        """The concept that the picture shows."""
        return self.options[self.answer]


def draw_questions(known: Sequence[Concept], unseen: Sequence[Concept], seed: int) -> list[BenchmarkQuestion]:
    """A question for each known concept (split `style`) and each unseen one (split `concept`).

    Wrong options come from the same split, so that a model cannot rule out names that it never saw with a picture.
    """
    questions = []
    splits: list[tuple[Literal["style", "concept"], Sequence[Concept]]] = [("style", known), ("concept", unseen)]
    for split, concepts in splits:
        for concept in concepts:
            generator = random.Random(f"{seed}:benchmark:{concept.key}")
            options = [concept, *draw_distractors(concept, concepts, generator, len(LETTERS) - 1)]
            generator.shuffle(options)
            questions.append(BenchmarkQuestion(split=split, options=tuple(options), answer=options.index(concept)))
    return questions


def encode_pictures(questions: Sequence[BenchmarkQuestion], image_size: int) -> list[str]:
    """The picture of each question in the held-out drawing style: base64 of a PNG."""
    return [_png_base64(openmoji_picture(question.concept, image_size)) for question in questions]


def write_benchmark(
    directory: Path, language: str, questions: Sequence[BenchmarkQuestion], pictures: Sequence[str]
) -> Path:
    """Write `mmmb_{language}.tsv` and return its path."""
    phrases = phrases_in(language)
    path = directory / f"mmmb_{file_suffix(language)}.tsv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(COLUMNS)
        for index, (question, picture) in enumerate(zip(questions, pictures, strict=True)):
            concept = question.concept
            writer.writerow(
                [
                    index,
                    phrases["name"][0],
                    *(option.names[language] for option in question.options),
                    LETTERS[question.answer],
                    concept.category,
                    concept.l2_category,
                    question.split,
                    picture,
                ]
            )
    return path


def _png_base64(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
