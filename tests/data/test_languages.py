"""Codes of languages: one form, suffixes of file names, scripts, questions from CLDR's lists; no fixed six in code."""
# ruff: noqa: RUF001 - signs of other scripts

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot_sys.data.languages import (
    MMMB_LANGUAGES,
    _facts,
    by_script,
    canonical,
    canonical_keys,
    file_suffix,
    in_order,
    join_list,
    language_codes,
    language_name,
    lookup,
    or_question,
    script_name,
    script_of,
    split_suffix,
)
from parrot_sys.data.mcq_prompt import ANSWER_WITH_LETTER, build_mcq_prompt
from parrot_sys.errors import ConfigError

PACKAGE = Path(__file__).resolve().parents[2] / "parrot_sys"
KNOWN = sorted({code.split("-")[0] for code in _facts()["names"]})

tags = st.builds(
    lambda language, rest: "-".join([language, *filter(None, rest)]),
    st.sampled_from(KNOWN),
    st.tuples(st.sampled_from(["", "Latn", "Cyrl"]), st.sampled_from(["", "BR", "419"]), st.sampled_from(["", "1996"])),
)


@settings(max_examples=60, deadline=None)
@given(tag=tags, change=st.sampled_from([str.lower, str.upper, str.title, lambda tag: tag.replace("-", "_")]))
def test_a_code_has_one_form_however_it_is_written(tag: str, change: object) -> None:
    assert canonical(tag) == tag
    assert canonical(change(tag)) == tag  # type: ignore[operator]


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=8))
def test_what_is_no_code_has_no_form_and_codes_keep_theirs(text: str) -> None:
    found = canonical(text)
    assert found is None or canonical(found) == found


@pytest.mark.parametrize("text", ["", "english", "e", "en-", "-en", "en--BR", "Brazilian Portuguese", "en-x", "e1"])
def test_names_of_languages_are_no_codes(text: str) -> None:
    assert canonical(text) is None
    with pytest.raises(ConfigError, match="languages must be a BCP 47 code such as en, pt-BR or zh-Hant, got"):
        language_codes(["en", text])


def test_settings_by_language_take_any_spelling() -> None:
    assert canonical_keys({"PT_br": 1, "a/b/CN": 2, "no code": 3}) == {"pt-BR": 1, "a/b/zh": 2, "no code": 3}


def test_aliases_of_other_programs() -> None:
    assert [canonical(code) for code in ("cn", "iw", "in", "tl", "cn-TW")] == ["zh", "he", "id", "fil", "zh-TW"]


@settings(max_examples=60, deadline=None)
@given(tag=tags, base=st.sampled_from(["mmmb", "mmbench_dev", "x_y_z"]))
def test_a_table_name_gives_its_language_back(tag: str, base: str) -> None:
    name = f"{base}_{file_suffix(tag)}"
    assert split_suffix(name) == (base, tag)
    assert split_suffix(name.lower()) == (base, tag)


@settings(max_examples=200, deadline=None)
@given(
    code=st.sampled_from(sorted(_facts()["aliases"])),
    rest=st.sampled_from(["", "-Latn", "-Latn-BR", "-419"]),
    change=st.sampled_from([str.lower, str.upper]),
)
def test_three_letter_codes_are_those_of_the_same_languages(code: str, rest: str, change: object) -> None:
    found = canonical(change(code + rest))  # type: ignore[operator]
    assert found is not None
    language = found.removesuffix(rest)
    assert len(language) == 2 or (code, language) in (("tgl", "fil"), ("bih", "bho"))
    assert canonical(found) == found


def test_three_letter_codes_of_both_kinds() -> None:
    codes = {"ind": "id", "zho": "zh", "chi": "zh", "nob": "no", "nor": "no", "twi": "tw", "fra": "fr", "fre": "fr"}
    codes |= {"zho_Hans": "zh-Hans", "ceb": "ceb", "yue": "yue", "min": "min", "jav": "jv", "mol": "ro"}
    assert {code: canonical(code) for code in codes} == codes
    # XMMMU, MultiBLiMP, IrokoBench, Belebele name their sets so
    for name, language in {
        "xmmmu_test_ind": "id",
        "xmmmu_test_zho": "zh",
        "multiblimp_cat": "ca",
        "afrixnli_translate_kin": "rw",
        "afrimmlu_twi": "tw",
    }.items():
        assert split_suffix(name) == (name.rpartition("_")[0], language)
        assert split_suffix(name.upper()) == (name.rpartition("_")[0].upper(), language)


# (Of the names of sets in lm-evaluation-harness and VLMEvalKit, the first line holds all that end in a code by chance.)
@pytest.mark.parametrize(
    "name",
    [
        *("infinitebench_code_run", "darija_sentiment_mac", "AraDiCE_piqa_msa", "abs_ori"),
        *("mmbench_dev", "mm_val", "x_test", "mmmu_pro", "my_set", "set", "run", "x_english"),
    ],
)
def test_names_that_end_in_a_word_have_no_language(name: str) -> None:
    assert split_suffix(name) == (name, None)


def test_names_of_tables_in_tests_and_docs_are_read_as_before() -> None:
    """Codes of three letters that are now read as languages are no ends of names that are none."""
    checkout = PACKAGE.parent
    files = [*(checkout / "docs").rglob("*.md"), *(checkout / "tests").rglob("*.py"), checkout / "README.md"]
    texts = [file.read_text(encoding="utf-8") for file in files if file != Path(__file__)]
    names = {name for text in texts for name in re.findall(r"([A-Za-z0-9_-]+)\.tsv\b", text)}
    assert {"mmmb_cn", "cvqa_min", "exam_ar-EG"} <= names
    for name in names:
        end = name.rpartition("_")[2].lower().split("-")[0]
        assert (split_suffix(name)[1] is None) == (end not in {"cn", *map(str.lower, _facts()["names"])})


def test_scripts() -> None:
    wanted = {"en": "Latn", "zh": "Hans", "zh-TW": "Hant", "zh-Hant-HK": "Hant", "sr": "Cyrl", "sr-Latn": "Latn"}
    wanted |= {
        "ar": "Arab",
        "he": "Hebr",
        "ja": "Jpan",
        "ko": "Kore",
        "pt-BR": "Latn",
        "qqq": "Zzzz",
        "no code": "Zzzz",
    }
    assert {code: script_of(code) for code in wanted} == wanted
    assert [script_name(script) for script in ("Deva", "Hans", "Zzzz")] == ["Devanagari", "Simplified Han", "Zzzz"]
    assert [language_name(code) for code in ("de", "zh-Hant", "de-LU", "qqq")] == [
        "German",
        "Traditional Chinese",
        "German",
        "qqq",
    ]
    groups = by_script(["th", "en", "ar", "de", "fa"])
    assert groups == {"Arab": ["ar", "fa"], "Latn": ["en", "de"], "Thai": ["th"]}


def test_a_longer_code_finds_the_shorter_ones_value_in_its_script_only() -> None:
    values = {"pt": 1, "zh": 2, "zh-Hant": 3, "sr": 4}
    wanted = {"pt": 1, "pt-BR": 1, "zh-CN": 2, "zh-TW": None, "zh-Hant-HK": 3, "sr-Latn": None, "de": None}
    assert {code: lookup(code, values) for code in wanted} == wanted


@given(codes=st.lists(st.sampled_from([*MMMB_LANGUAGES, "de", "th", "pt-BR"])))
def test_reports_begin_with_the_languages_of_mmmb(codes: list[str]) -> None:
    order = in_order(codes)
    assert sorted(order) == sorted(set(codes))
    assert [code for code in order if code in MMMB_LANGUAGES] == [code for code in MMMB_LANGUAGES if code in codes]
    others = order[sum(code in MMMB_LANGUAGES for code in order) :]
    assert others == sorted(others)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_a_list_with_or_holds_every_option_in_order(count: int) -> None:
    letters = "ABCDEFGH"[:count]
    for code, patterns in _facts()["or"].items():
        text = or_question(letters, code)
        assert text is not None
        assert text.endswith(patterns["question"])
        assert "".join(re.findall(r"(?<![A-Za-z])[A-H](?![A-Za-z])", text)) == letters, (code, text)
        assert "{" not in text
    assert join_list(letters, _facts()["or"]["en"]["list"]) == {
        1: "A",
        2: "A or B",
        3: "A, B, or C",
    }.get(count, ", ".join(letters[:-1]) + f", or {letters[-1]}")


def test_the_last_line_of_a_prompt_in_any_language() -> None:
    def last_line(language: str) -> str:
        return build_mcq_prompt("?", dict(zip("ABCD", "wxyz", strict=True)), language).split("\n")[-1]

    kit = {language: last_line(language) for language in MMMB_LANGUAGES}
    assert kit == dict(ANSWER_WITH_LETTER)
    assert last_line("pt-BR") == kit["pt"]
    assert [last_line(code) for code in ("de", "zh-Hant", "ur")] == [
        "A, B, C oder D?",
        "A、B、C或D？",
        "A، B، C، یا D؟",
    ]
    assert last_line("qqq") == kit["en"]


_WORDINGS = (
    "data/languages.py",
    "data/mcq_prompt.py",
    "inference/chat_texts.py",
    "integrations/vlmevalkit/vlmevalkit_models.py",
)
"""Files that may name languages: the order of MMMB, texts that somebody wrote in these, of another tool's sets."""


def test_no_other_code_knows_which_languages_there_are() -> None:
    """Neither a collection of codes nor the kit's name for Chinese, outside of the files that have texts in them."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if (name := str(path.relative_to(PACKAGE))) in _WORDINGS:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            texts = {each.value for each in ast.iter_child_nodes(node) if isinstance(each, ast.Constant)}
            if len(texts & set(MMMB_LANGUAGES)) > 1 or (isinstance(node, ast.Constant) and node.value == "cn"):
                found.append(f"{name}:{node.lineno}")
    assert not found, "take languages from the data, their order and suffixes from data/languages.py"
