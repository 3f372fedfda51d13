"""Interleaved dialogues of the default data set: multi-turn questions with and without a picture, one table a language.

Wings (arXiv 2406.03496) scores the last turn of dialogues of six types, T, TT, TTT, TTV, TV and V: a letter is a turn,
T about words alone, V about a picture. Its own questions were not published; these are made of the same concepts as the
rest of the data set, and their earlier turns ask about things of the same category, with the right answers given.

Columns are those of the other tables (`questions.py`) and `history`: a JSON list of the earlier turns, each a list
of question and answer. `split` is the type, `category` the kind of the last question; `image` is empty where the last
turn has no picture.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from parrot_sys.data.corpora.default.concepts import Concept
from parrot_sys.data.corpora.default.conversations import LETTERS, Asker, Turn, draw_distractors
from parrot_sys.data.corpora.default.questions import BenchmarkQuestion
from parrot_sys.data.languages import file_suffix

DIALOGUE_TYPES = ("T", "TT", "TTT", "TTV", "TV", "V")
DIALOGUE_COLUMNS = ("index", "history", "question", *LETTERS, "answer", "category", "split", "image")

Kind = Literal["translation", "riddle", "name"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Dialogue:
    """One dialogue, about the same concepts in every language."""

    type: str
    kind: Kind
    """Question of the last turn: a foreign word's name, the name that keywords describe, or what the picture shows."""
    options: tuple[Concept, ...]
    answer: int
    """Position of the right one."""
    earlier: tuple[tuple[Kind, Concept], ...]
    """Kind (never `name`) and right answer of each earlier turn."""

    @property
    def concept(self) -> Concept:
        """The concept that the last turn is about."""
        return self.options[self.answer]


def draw_dialogues(questions: Sequence[BenchmarkQuestion], seed: int) -> list[Dialogue]:
    """A dialogue of each type about each known concept, the types one after the other.

    Args:
        questions: of the benchmark; those of the split `style` become the last turns of V, TV and TTV.
        seed: decides text questions and earlier turns.
    """
    shown = [question for question in questions if question.split == "style"]
    known = [question.concept for question in shown]
    dialogues = []
    for kind in DIALOGUE_TYPES:
        for question in shown:
            generator = random.Random(f"{seed}:dialogue:{kind}:{question.concept.key}")
            last: Kind = "name"
            options = question.options
            if kind[-1] == "T":
                drawn = [question.concept, *draw_distractors(question.concept, known, generator, len(LETTERS) - 1)]
                generator.shuffle(drawn)
                options, last = tuple(drawn), _text_kind(generator)
            dialogues.append(
                Dialogue(
                    type=kind,
                    kind=last,
                    options=options,
                    answer=options.index(question.concept),
                    earlier=_earlier(question.concept, options, known, len(kind) - 1, generator),
                )
            )
    return dialogues


def _text_kind(generator: random.Random) -> Kind:
    return generator.choice(("translation", "riddle"))


def _earlier(
    concept: Concept, options: Sequence[Concept], known: Sequence[Concept], count: int, generator: random.Random
) -> tuple[tuple[Kind, Concept], ...]:
    """Similar things come first; none is an option of the last turn, whose answer would be there already."""
    others = [other for other in known if other not in options]
    generator.shuffle(others)
    others.sort(key=lambda other: other.category != concept.category)
    return tuple((_text_kind(generator), other) for other in others[:count])


def write_dialogues(
    directory: Path,
    language: str,
    languages: Sequence[str],
    dialogues: Sequence[Dialogue],
    pictures: Mapping[str, str],
    seed: int,
) -> Path:
    """Writes `iit_{language}.tsv` and returns its path.

    Args:
        directory: where to.
        language: of the table.
        languages: that foreign words come from.
        dialogues: from `draw_dialogues`.
        pictures: emoji -> base64 of its picture.
        seed: decides foreign words and keywords.
    """
    path = directory / f"iit_{file_suffix(language)}.tsv"
    held: dict[str, int] = {}
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(DIALOGUE_COLUMNS)
        for index, dialogue in enumerate(dialogues):
            generator = random.Random(f"{seed}:dialogue:{language}:{index}")
            asker = Asker(language=language, pool=dialogue.options, languages=languages, generator=generator)
            history = [_open_turn(asker, kind, concept) for kind, concept in dialogue.earlier]
            kind, question = _last_question(asker, dialogue)
            image: str | int = ""
            if kind == "name":  # a picture is stored once in the table; other rows name that row
                emoji = dialogue.concept.emoji
                image = held.get(emoji, pictures[emoji])
                held.setdefault(emoji, index)
            writer.writerow(
                [
                    index,
                    json.dumps(history, ensure_ascii=False),
                    question,
                    *(option.names[language] for option in dialogue.options),
                    LETTERS[dialogue.answer],
                    kind,
                    dialogue.type,
                    image,
                ]
            )
    return path


def _open_turn(asker: Asker, kind: Kind, concept: Concept) -> Turn:
    return asker.riddle(concept) if kind == "riddle" else asker.translation(concept)


def _last_question(asker: Asker, dialogue: Dialogue) -> tuple[Kind, str]:
    """Kind and text of the question; where CLDR has no keywords in the language, a foreign word is asked about."""
    if dialogue.kind == "name":
        return "name", asker.phrases["name"][0]
    kind: Kind = "riddle" if dialogue.kind == "riddle" and dialogue.concept.keywords[asker.language] else "translation"
    return kind, _open_turn(asker, kind, dialogue.concept)[0]
