"""Languages as BCP 47 codes (`en`, `pt-BR`, `zh-Hant`): their form, script, order in reports, suffix in file names.

Facts about languages come from CLDR (`languages.json`, made by `parrot data vendor`). Any well-formed code is accepted,
whether CLDR knows it or not.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from parrot_sys.errors import ConfigError

LANGUAGES_FILE = Path(__file__).parent / "languages.json"
MMMB_LANGUAGES = ("en", "zh", "pt", "ar", "tr", "ru")
"""The languages of MMMB, in its order: first in reports, and what its tables and the default corpus have by default."""
OTHER = "other"
"""Name of what has no language, or one that is no code, in metrics."""
UNKNOWN_SCRIPT = "Zzzz"
"""ISO 15924's code for an unknown script."""

_CODE = re.compile(
    r"(?P<language>[a-z]{2,3})(?:-(?P<script>[a-z]{4}))?(?:-(?P<region>[a-z]{2}|\d{3}))?"
    r"(?:-(?:[a-z0-9]{5,8}|\d[a-z0-9]{3}))*(?:-x(?:-[a-z0-9]{1,8})+)?",
    re.IGNORECASE,
)
_ALIASES = {
    "cn": "zh",
    "in": "id",
    "iw": "he",
    "ji": "yi",
    "jw": "jv",
    "mo": "ro",
    "nb": "no",
    "tl": "fil",
    "twi": "tw",
}
"""Codes that other programs write -> BCP 47: the public kit's for Chinese, withdrawn ones of ISO 639.

CLDR has those of three letters; the one here it counts as Akan.
"""
_SUFFIXES = {"zh": "cn"}
"""Languages that the public kit's file names call otherwise."""

_WORDS = frozenset(("arm", "geo", "hat", "her", "ice", "mac", "may", "msa", "ori", "per", "run", "ton"))
"""Three-letter codes that are other words at the end of a name: `code_run`, `sentiment_mac`, `abs_ori`."""

_NAMES = {"bengali": "bn", "egyptian arabic": "ar-EG", "mandarin": "zh", "oriya": "or", "brazilian portuguese": "pt-BR"}
"""Names that public sets use and CLDR does not -> their codes."""

T = TypeVar("T")


def canonical(code: str) -> str | None:
    """A code in its usual form (`PT_br` -> `pt-BR`, `iw` -> `he`, `ind` -> `id`); None where it is no BCP 47 code."""
    match = _CODE.fullmatch(code.strip().replace("_", "-"))
    if match is None:
        return None
    subtags = match[0].lower().split("-")
    language = subtags[0]
    if len(language) == 3 and language not in _ALIASES:
        language = _facts()["aliases"].get(language, language)
    language = _ALIASES.get(language, language)
    rest = subtags[1:]
    if match["script"]:
        rest[0] = rest[0].title()
    if match["region"]:
        place = 1 if match["script"] else 0
        rest[place] = rest[place].upper()
    return "-".join([language, *rest])


def language_code(code: str, what: str = "language") -> str:
    """`canonical` of a code that a user names.

    Raises:
        ConfigError: it is none; names `what` it is.
    """
    found = canonical(code)
    if found is None:
        raise ConfigError(f"{what} must be a BCP 47 code such as en, pt-BR or zh-Hant, got {code!r}")
    return found


def language_codes(codes: Iterable[str], what: str = "languages") -> tuple[str, ...]:
    """`language_code` of each."""
    return tuple(language_code(code, what) for code in codes)


def canonical_keys(values: Mapping[str, T]) -> dict[str, T]:
    """The same values for codes in their usual form; a key is a code or `SET/CODE`, and stays as it is otherwise."""
    found = {}
    for key, value in values.items():
        data_set, separator, code = key.rpartition("/")
        found[f"{data_set}{separator}{canonical(code) or code}"] = value
    return found


def lookup(code: str, values: Mapping[str, T]) -> T | None:
    """The value of a code, or of the code with fewer subtags (RFC 4647: `pt-BR`, then `pt`); None without one.

    A code whose script is another than that of the shorter code has none of its values: `zh-Hant` is not read as `zh`.
    """
    subtags, script = code.split("-"), script_of(code)
    while subtags:
        shorter = "-".join(subtags)
        if shorter in values and script_of(shorter) == script:
            return values[shorter]
        subtags.pop()
    return None


def language_order(code: str) -> tuple[int, str]:
    """Sort key: the languages of MMMB in its order, then the others by their code."""
    place = MMMB_LANGUAGES.index(code) if code in MMMB_LANGUAGES else len(MMMB_LANGUAGES)
    return place, code


def in_order(codes: Iterable[str]) -> list[str]:
    """The codes, each once, in the order of reports."""
    return sorted(set(codes), key=language_order)


def file_suffix(code: str) -> str:
    """End of the name of a table in a language: the code, but `cn` for `zh` as in the public kit."""
    return _SUFFIXES.get(code, code)


def split_suffix(name: str) -> tuple[str, str | None]:
    """(name without its language, the language) of a data set: `mmmb_cn` -> (`mmmb`, `zh`).

    The language is None where the name ends in no language that CLDR has locale data for: ISO 639 has the codes `val`,
    `set` and `pro` as well. Nor is it one that is rather a word, such as `run`. A name that is a code alone stays as it
    is.
    """
    base, _, end = name.rpartition("_")
    code = canonical(end)
    if code is None or end.lower() in _WORDS or code.split("-")[0] not in _facts()["names"]:
        return name, None
    return base or name, code


def script_of(code: str) -> str:
    """ISO 15924 code of the script that a language is written in, such as `Latn`; `Zzzz` where CLDR does not say.

    Chinese is `Hans` or `Hant`, Japanese `Jpan`, Korean `Kore`, as in CLDR.
    """
    match = _CODE.fullmatch(code)
    if match is None:
        return UNKNOWN_SCRIPT
    if match["script"]:
        return match["script"]
    scripts = _facts()["scripts"]
    region = f"{match['language']}-{match['region']}"
    return scripts.get(region) or scripts.get(match["language"], UNKNOWN_SCRIPT)


def script_name(script: str) -> str:
    """English name of a script, such as `Latin`; its code where CLDR has none."""
    return _facts()["script_names"].get(script, script)


def language_name(code: str) -> str:
    """English name of a language, such as `Brazilian Portuguese`; its code where CLDR has none."""
    return lookup(code, _facts()["names"]) or code


def code_of_name(name: str) -> str | None:
    """Code of a language that a data set names in English; None where it is not known."""
    plain = name.replace("_", " ").strip().casefold()
    names = {own.casefold(): code for code, own in _facts()["names"].items()}
    return _NAMES.get(plain) or names.get(plain)


def by_script(codes: Iterable[str]) -> dict[str, list[str]]:
    """Script -> its languages; scripts with many languages first."""
    groups: dict[str, list[str]] = {}
    for code in codes:
        groups.setdefault(script_of(code), []).append(code)
    return dict(sorted(groups.items(), key=lambda group: (-len(group[1]), group[0])))


def or_question(options: Sequence[str], code: str) -> str | None:
    """`A, B, C or D?` in a language, by CLDR's pattern of a list with "or"; None where CLDR has none."""
    patterns = lookup(code, _facts()["or"])
    if patterns is None or not options:
        return None
    return join_list(options, patterns["list"]) + patterns["question"]


def join_list(items: Sequence[str], patterns: Mapping[str, str]) -> str:
    """The items as one text, by CLDR's patterns `start`, `middle`, `end` and `2`."""
    if len(items) < 2:
        return "".join(items)
    if len(items) == 2:
        return _fill(patterns["2"], *items)
    text = _fill(patterns["end"], items[-2], items[-1])
    for item in reversed(items[1:-2]):
        text = _fill(patterns["middle"], item, text)
    return _fill(patterns["start"], items[0], text)


def _fill(pattern: str, *values: str) -> str:
    return re.sub(r"\{(\d)\}", lambda match: values[int(match[1])], pattern)


@functools.cache
def _facts() -> Mapping[str, Any]:
    return json.loads(LANGUAGES_FILE.read_text(encoding="utf-8"))
