"""Languages of the default data set: distinct names, prompts of CLDR's parts, and all that is vendored for them."""

from __future__ import annotations

import json
import random
import string
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot_sys.data.corpora.default.build import DataBuildConfig, build
from parrot_sys.data.corpora.default.concepts import CONCEPTS_FILE, L2_CATEGORY, load_concepts
from parrot_sys.data.corpora.default.conversations import PICTURE_TURNS, TEXT_TURNS, Asker, picture_turns, text_turns
from parrot_sys.data.corpora.default.initial_decoder import InitialDecoderConfig
from parrot_sys.data.corpora.default.offered import ASSETS, LANGUAGES_FOLDER, MORE_LANGUAGES, OFFERED, language_file
from parrot_sys.data.corpora.default.phrases import load_phrases, phrases_in
from parrot_sys.data.languages import LANGUAGES_FILE, MMMB_LANGUAGES, canonical, file_suffix, language_name, script_of
from parrot_sys.data.main import main
from parrot_sys.errors import ConfigError
from parrot_sys.evaluation.tsv import read_table

CONCEPTS = load_concepts(OFFERED)


def test_what_is_offered() -> None:
    assert len(OFFERED) == len(set(OFFERED)) >= 48
    assert OFFERED[: len(MMMB_LANGUAGES)] == MMMB_LANGUAGES
    assert all(canonical(code) == code for code in OFFERED)
    assert set(load_phrases()) == set(MMMB_LANGUAGES)  # in these, somebody wrote the questions
    assert {path.name for path in (ASSETS / LANGUAGES_FOLDER).iterdir()} == {
        f"{code}.json.gz" for code in MORE_LANGUAGES
    }
    assert len({script_of(code) for code in OFFERED[:24]}) >= 10
    vendored = [ASSETS / CONCEPTS_FILE, LANGUAGES_FILE, *map(language_file, MORE_LANGUAGES)]
    assert sum(path.stat().st_size for path in vendored) <= 1_000_000


@pytest.mark.parametrize("language", OFFERED)
def test_every_concept_has_a_name_of_its_own(language: str) -> None:
    names = {unicodedata.normalize("NFKC", concept.names[language]).casefold().strip() for concept in CONCEPTS}
    assert len(names) == len(CONCEPTS)
    assert "" not in names
    assert sum(bool(concept.keywords[language]) for concept in CONCEPTS) > 0.9 * len(CONCEPTS)


def fields(value: Any) -> Any:
    """Placeholders of each phrase."""
    if isinstance(value, str):
        return sorted(name for _, name, _, _ in string.Formatter().parse(value) if name)
    return [fields(each) for each in value] if isinstance(value, list) else {key: fields(value[key]) for key in value}


@pytest.mark.parametrize("language", MORE_LANGUAGES)
def test_prompts_of_cldrs_parts_ask_what_written_ones_ask(language: str) -> None:
    phrases, english = phrases_in(language), load_phrases()["en"]
    assert set(english) - set(phrases) == {"keywords", "word_keywords"}
    for kind in set(phrases) - {"languages", "categories"}:
        assert fields(phrases[kind]) == fields(english[kind]), kind
    assert set(phrases["categories"]) == set(L2_CATEGORY)
    assert len(set(phrases["categories"].values())) == 10
    for text in set(phrases["categories"].values()):
        assert text in phrases["category"]
    assert phrases["yes"] != phrases["no"]
    assert phrases["yes"] != "yes"  # nothing is English by inheritance
    assert phrases["separator"].strip()
    own = phrases["languages"][language]
    assert own in phrases["name"][0]
    assert own in phrases["name"][1]
    assert "Language" not in phrases["name"][1]
    assert own != language_name(language) or language == "fil"


@settings(max_examples=60, deadline=None)
@given(language=st.sampled_from(MORE_LANGUAGES), seed=st.integers(0, 10**6), place=st.integers(0, len(CONCEPTS) - 1))
def test_every_question_has_one_right_answer(language: str, seed: int, place: int) -> None:
    """Options are distinct, and the answer is one of them; nothing is left to fill in."""
    asker = Asker(language=language, pool=CONCEPTS[:300], languages=OFFERED, generator=random.Random(seed))
    concept = CONCEPTS[place]
    turns = [*picture_turns(asker, concept, count=4), *text_turns(asker, [concept] * 4)]
    turns += [asker.category_choice(concept), asker.name_choice(concept), asker.description(concept)]
    assert len(turns) == 11
    for question, answer in turns:
        assert question
        assert answer
        assert "{" not in question + answer
        options = [line[3:] for line in question.split("\n") if line[:3] in ("A. ", "B. ", "C. ", "D. ")]
        if options:
            assert len(set(options)) == 4
            assert answer in options


def test_kinds_without_wording_are_never_drawn() -> None:
    asker = Asker(language="de", pool=CONCEPTS[:50], languages=("de",), generator=random.Random(0))
    assert {"keywords"} <= set(PICTURE_TURNS) - set(asker.phrases)
    assert {"word_keywords"} <= set(TEXT_TURNS) - set(asker.phrases)
    for concept in CONCEPTS[:50]:
        picture_turns(asker, concept, count=len(PICTURE_TURNS) - 1)
        with pytest.raises(IndexError):  # there are no more kinds
            picture_turns(asker, concept, count=len(PICTURE_TURNS))


SMALL: Mapping[str, Any] = {
    "concepts": 12,
    "held_out": 4,
    "image_size": 32,
    "variants": 1,
    "text_rounds": 1,
    "align_rounds": 1,
    "instruct_rounds": 1,
    "vocab_size": 600,
    "decoder": InitialDecoderConfig(hidden_size=64),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "set"
    assert build(DataBuildConfig(output=folder, languages=OFFERED, **SMALL))
    return folder


def test_a_data_set_in_all_languages(built: Path) -> None:
    for name in ("text", "align", "detail", "instruct", "validation"):
        records = json.loads((built / f"{name}.json").read_text(encoding="utf-8"))
        assert {record["lang"] for record in records} == set(OFFERED)
    for language in OFFERED:
        table = read_table(built / "benchmark" / f"mmmb_{file_suffix(language)}.tsv")
        assert (table.suite, table.language, table.problems) == ("mmmb", language, [])
        assert len(table.questions) == 16
        assert all(len(set(question.options.values())) == 4 for question in table.questions)
        assert read_table(built / "iit" / f"iit_{file_suffix(language)}.tsv").language == language


def test_the_default_languages_know_nothing_of_the_others(built: Path, tmp_path: Path) -> None:
    """The picture questions of a language are the same whatever other languages a set has."""
    assert build(DataBuildConfig(output=tmp_path / "six", **SMALL))
    for name in ("align", "detail"):
        own, all_of_them = (
            [record for record in json.loads((folder / f"{name}.json").read_text()) if record["lang"] in MMMB_LANGUAGES]
            for folder in (tmp_path / "six", built)
        )
        assert own == all_of_them
    for path in sorted((tmp_path / "six" / "benchmark").iterdir()):
        assert path.read_bytes() == (built / "benchmark" / path.name).read_bytes()


def test_settings_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"languages must be distinct and among en, zh, .*zh-Hant.*, got en, te"):
        DataBuildConfig(output=tmp_path, languages=("en", "te"))
    with pytest.raises(ConfigError, match=r"decoder.hidden_size must be >= 58: one for each of 48 languages"):
        DataBuildConfig(output=tmp_path, languages=OFFERED, decoder=InitialDecoderConfig(hidden_size=48))


def test_command_that_lists_the_languages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["languages"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(OFFERED)
    assert "| zh-Hant | Traditional Chinese | Traditional Han | from CLDR |" in lines
