"""Dialogues of the six types: what their turns are about, which have a picture, and that no answer is given away."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from parrot_sys.data.corpora.default.concepts import choose_concepts
from parrot_sys.data.corpora.default.dialogues import DIALOGUE_TYPES, draw_dialogues, write_dialogues
from parrot_sys.data.corpora.default.questions import draw_questions, write_benchmark
from parrot_sys.evaluation.tsv import QuestionSet, read_table

LANGUAGES = ("en", "ar", "zh")
NUM_KNOWN = 20
PICTURE = "A" * 100  # tables hold what they are given


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, QuestionSet]:
    folder = tmp_path_factory.mktemp("iit")
    known, unseen = choose_concepts(NUM_KNOWN, 5, 0)
    questions = draw_questions(known, unseen, 0)
    pictures = {concept.emoji: f"{PICTURE}{concept.key}" for concept in known}
    dialogues = draw_dialogues(questions, 0)
    for language in LANGUAGES:
        write_dialogues(folder, language, LANGUAGES, dialogues, pictures, 0)
        write_benchmark(folder, language, questions, [pictures.get(q.concept.emoji, PICTURE) for q in questions])
    return {path.stem: read_table(path) for path in folder.glob("*.tsv")}


def test_types_turns_and_pictures(tables: dict[str, QuestionSet]) -> None:
    parts = tables["iit_en"].parts()
    assert tuple(parts) == DIALOGUE_TYPES
    for kind, questions in parts.items():
        assert len(questions) == NUM_KNOWN
        assert {len(question.history) for question in questions} == {len(kind) - 1}
        for question in questions:
            assert (question.image_key is not None) == kind.endswith("V")
            assert (question.category == "name") == kind.endswith("V")


def test_earlier_turns_do_not_give_the_answer_away(tables: dict[str, QuestionSet]) -> None:
    for question in tables["iit_en"].questions:
        answers = [answer for _, answer in question.history]
        assert len(set(answers)) == len(answers)
        assert not set(answers) & set(question.options.values())


def test_last_turns_about_pictures_are_those_of_the_benchmark(tables: dict[str, QuestionSet]) -> None:
    iit, mmmb = tables["iit_ar"], tables["mmmb_ar"]
    benchmark = mmmb.parts()["style"]
    for kind in ("V", "TV", "TTV"):
        for ours, theirs in zip(iit.parts()[kind], benchmark, strict=True):
            assert (ours.question, ours.options, ours.answer) == (theirs.question, theirs.options, theirs.answer)
            assert iit.images[str(ours.image_key)] == mmmb.images[str(theirs.image_key)]
    assert len(iit.images) == NUM_KNOWN  # each picture stands in the table once


def test_languages_ask_about_the_same_things_in_their_own_words(tables: dict[str, QuestionSet]) -> None:
    english, chinese = tables["iit_en"], tables["iit_zh" if "iit_zh" in tables else "iit_cn"]
    for first, second in zip(english.questions, chinese.questions, strict=True):
        assert (first.index, first.answer, first.split) == (second.index, second.answer, second.split)
        assert first.question != second.question


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    known, unseen = choose_concepts(NUM_KNOWN, 5, 3)
    questions = draw_questions(known, unseen, 3)
    texts = []
    for seed in (3, 3, 4):
        dialogues = draw_dialogues(questions, seed)
        pictures = {concept.emoji: PICTURE for concept in known}
        texts.append(write_dialogues(tmp_path, "en", LANGUAGES, dialogues, pictures, seed).read_bytes())
    assert texts[0] == texts[1] != texts[2]
    rows = list(csv.DictReader(texts[0].decode().splitlines(), delimiter="\t"))
    assert all(len(json.loads(row["history"])) == len(row["split"]) - 1 for row in rows)
