"""CLDR's JSON packages as the maintainers' command reads them: names of pictures, facts about languages, phrases."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parrot_sys.data.languages import canonical
from parrot_sys.errors import DataError

_NOT_COVERED = ("min",)
"""Languages of public sets (CVQA) of which CLDR knows little more than the name."""
_QUESTION_MARKS = frozenset("?\uff1f\u061f;\u055e")
_CATEGORY_LABELS: Mapping[str, str] = {
    "faces": "smiley",
    "people": "person",
    "mammals": "animal",
    "other_animals": "animal",
    "plants": "plant",
    "sky_weather": "weather",
    "fruit_vegetables": "food_drink",
    "dishes": "food_drink",
    "drinks_tableware": "food_drink",
    "places": "place",
    "vehicles": "travel",
    "sports_games": "activities",
    "music_electronics": "objects",
    "clothing": "objects",
    "tools_household": "objects",
}
"""Category of the concepts -> CLDR's label of a group of characters, which is coarser."""


@dataclass(frozen=True, slots=True)
class Cldr:
    """The npm packages cldr-annotations-full, -core, -localenames-full and -misc-full, unpacked into one folder."""

    folder: Path

    def annotations(self, language: str) -> Mapping[str, Any]:
        """Emoji -> `tts` (its name) and `default` (keywords) in a language."""
        return self._read(f"annotations/{language}/annotations.json")["annotations"]["annotations"]

    def facts(self) -> dict[str, Any]:
        """The content of `data/languages.json`."""
        with_data = self._read("coverageLevels.json")["coverageLevels"]
        covered = {code.split("-")[0] for code in with_data}
        names = {
            code: name
            for code, name in self._names("en", "languages").items()
            if canonical(code) == code
            and (len(base := code.split("-")[0]) == 2 or base in covered or base in _NOT_COVERED)
        }
        likely = self._read("supplemental/likelySubtags.json")["supplemental"]["likelySubtags"]
        scripts = {code: likely[code].split("-")[1] for code in names if code in likely}
        for code, full in likely.items():
            language, _, region = code.partition("-")
            if language in scripts and re.fullmatch("[A-Z]{2}", region) and full.split("-")[1] != scripts[language]:
                scripts[code] = full.split("-")[1]
        own_names = self._names("en", "scripts")
        script_names = {code: own_names.get(f"{code}-alt-stand-alone", name) for code, name in own_names.items()}
        used = {*scripts.values()}
        patterns = {code: found for code in sorted(with_data) if (found := self._or(code)) is not None}
        return {
            "aliases": self._long_codes(),
            "names": dict(sorted(names.items())),
            "scripts": dict(sorted(scripts.items())),
            "script_names": {code: name for code, name in sorted(script_names.items()) if code in used},
            "or": patterns,
        }

    def _long_codes(self) -> dict[str, str]:
        """Three-letter codes of ISO 639 -> the codes of the same languages that BCP 47 has, mostly of two letters."""
        known = self._read("supplemental/aliases.json")["supplemental"]["metadata"]["alias"]["languageAlias"]
        return {
            code: alias["_replacement"]
            for code, alias in sorted(known.items())
            if alias["_reason"] in ("overlong", "bibliographic") and "-" not in alias["_replacement"]
        }

    def phrases(self, language: str) -> dict[str, Any]:
        """Parts of prompts and answers in a language, all as CLDR has them.

        Raises:
            DataError: CLDR has no text of this language for one of them, but that of English or of none.
        """
        messages = self._main(language, "posix")["posix"]["messages"]
        display = self._main(language, "localeDisplayNames")["localeDisplayNames"]
        labels = self._main(language, "characterLabels")["characterLabels"]
        patterns = self._or(language)
        found = {
            "own": self._names(language, "languages").get(language),
            "yes": _first_word(messages.get("yesstr", "")),
            "no": _first_word(messages.get("nostr", "")),
            "label": display["codePatterns"]["language"],
            "colon": display["localeDisplayPattern"]["localeKeyTypePattern"],
            "comma": display["localeDisplayPattern"]["localeSeparator"],
            "or": None if patterns is None else patterns["list"],
            "question": self._question_mark(language),
            "categories": {category: labels[label] for category, label in _CATEGORY_LABELS.items()},
        }
        english = {"yes": "yes", "label": "Language: {0}"}
        for name, value in found.items():
            if not value or value == english.get(name):
                raise DataError(f"CLDR has no {name!r} of its own for the language {language}")
        return found

    def _or(self, language: str) -> dict[str, Any] | None:
        """Patterns of a list with "or" and the question mark; None where CLDR has no word for "or"."""
        if not (self.folder / "main" / language / "listPatterns.json").is_file():
            return None
        found = self._main(language, "listPatterns")["listPatterns"]["listPattern-type-or"]
        patterns = {name: found[name] for name in ("start", "middle", "end", "2")}
        word = re.sub(r"\{\d\}", "", patterns["end"]).strip(" ,")
        if not re.search(r"\w", word) or (language != "en" and word == "or"):
            return None
        return {"list": patterns, "question": self._question_mark(language)}

    def _question_mark(self, language: str) -> str:
        """CLDR's sign for "more information", which is the question mark; `?` where it is something else."""
        mark = self._main(language, "characters")["characters"].get("moreInformation", "?").strip("()")
        return mark if mark in _QUESTION_MARKS else "?"

    def _names(self, language: str, kind: str) -> Mapping[str, str]:
        return self._main(language, kind)["localeDisplayNames"][kind]

    def _main(self, language: str, name: str) -> Mapping[str, Any]:
        return self._read(f"main/{language}/{name}.json")["main"][language]

    def _read(self, name: str) -> Mapping[str, Any]:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))


def _first_word(text: str) -> str:
    """The first of CLDR's answers, which are separated by colons, or signs like one: `ja:j` -> `ja`."""
    return re.split(r"[:\u17d6\u0903]", text)[0].strip(" \u200b")
