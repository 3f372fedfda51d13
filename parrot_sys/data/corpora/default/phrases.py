"""Wordings of questions and answers: written ones for the default languages, made of CLDR's parts for the others."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from parrot_sys.data.corpora.default.offered import ASSETS, read_language
from parrot_sys.data.languages import join_list

PHRASES_FILE = "phrases.yaml"


@functools.cache
def load_phrases() -> Mapping[str, Mapping[str, Any]]:
    """Language -> wordings of questions, names of categories and of languages, where somebody wrote them."""
    return yaml.safe_load((ASSETS / PHRASES_FILE).read_text(encoding="utf-8"))


@functools.cache
def phrases_in(language: str) -> Mapping[str, Any]:
    """Wordings in a language."""
    written = load_phrases().get(language)
    return corpus_phrases(language, read_language(language)["cldr"]) if written is None else written


def wordings(language: str) -> list[str]:
    """All strings of one language that questions and answers are made of, names and keywords apart."""

    def strings(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for part in entry.values() if isinstance(entry, Mapping) else entry:
                yield from strings(part)

    return list(strings(phrases_in(language)))


def corpus_phrases(language: str, cldr: Mapping[str, Any]) -> dict[str, Any]:
    """Wordings of questions like those of `phrases.yaml`, without a sentence that nobody checked.

    CLDR has no questions. Its parts say enough: the language's own name asks for a name in that language
    ("Deutsch: ?"), "or" between categories asks for one of them, a name with a question mark asks for yes or no. There
    are no questions about keywords.

    Args:
        language: code.
        cldr: from `Cldr.phrases`.
    """
    own, mark = cldr["own"], cldr["question"]
    kinds = join_list(list(dict.fromkeys(cldr["categories"].values())), cldr["or"]) + mark
    colon = cldr["colon"].replace("{0}", "{first}").replace("{1}", "{second}")
    return {
        "name": [colon.format(first=own, second=mark), cldr["label"].replace("{0}", own) + mark],
        "category": kinds,
        "yes_no": "{name}" + mark,
        "yes": cldr["yes"],
        "no": cldr["no"],
        "separator": cldr["comma"].replace("{0}", "").replace("{1}", ""),
        "translate": colon.format(first="{language}", second="{name}" + mark),
        "means": "{name} = " + mark,
        "riddle": "{words} = " + mark,
        "word_category": colon.format(first="{name}", second=kinds),
        "languages": {language: own},
        "categories": dict(cldr["categories"]),
    }
