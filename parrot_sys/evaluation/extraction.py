"""Which option a free-text answer names: by the rules of the public evaluation kit, or by more lenient ones.

VLMEvalKit, vlmeval/utils/matching_util.py, has had three versions of these rules, which give different numbers for the
same predictions:

* `2024`: until 4 August 2025; also those of the copy of the kit in Parrot's repository.
* `2025`: from then to 17 June 2026. A letter must be near the end of the answer, and the texts of the options are
  not looked for in long answers.
* `current`: since then. It also reads "the answer is X".

`lenient` reads what `current` reads, and where that finds nothing it tries again for answers in the languages of MMMB
(see `parrot_sys.evaluation.lenient`). No public kit scores so; it is for knowing how many answers the rules miss.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, get_args

from parrot_sys.errors import ConfigError
from parrot_sys.evaluation.lenient import lenient_option

KitRules = Literal["current", "2025", "2024"]
Rules = Literal["current", "2025", "2024", "lenient"]

_API_FAILURE = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_PUNCTUATION_TO_SPACE = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_ANSWER_IS = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_LETTER_WITHIN_LAST = 4
"""Since `2025`: the first occurrence of the letter must be one of the last four words."""


def extract_option(prediction: object, options: Mapping[str, str], rules: Rules = "current") -> str | None:
    """Letter that `prediction` names, by rules alone (no judge model).

    Args:
        prediction: answer of the model; anything but a string is converted as the kit does (`str`).
        options: letter -> text of the options that exist.
        rules: version of the rules.

    Returns:
        A letter of `options`, `"Z"` for a refusal, or None where the rules find nothing; the last two score as wrong.

    Raises:
        ConfigError: for unknown `rules`.
    """
    if rules not in get_args(Rules):
        raise ConfigError(f"rules must be one of {', '.join(get_args(Rules))}, got {rules!r}")
    answer = str(prediction)
    if rules != "lenient":
        return _by_letter(answer, options, rules) or _by_text(answer, options, rules)
    return extract_option(answer, options, "current") or lenient_option(answer, options)


def beside(rules: Rules) -> Rules:
    """The rules that are always reported next to `rules`: lenient ones beside the kit's, the kit's beside lenient."""
    return "current" if rules == "lenient" else "lenient"


def _by_letter(answer: str, options: Mapping[str, str], rules: KitRules) -> str | None:
    if _API_FAILURE in answer:
        return None
    if any(refusal in answer for refusal in _REFUSALS):
        return "Z"
    words = answer.translate(_PUNCTUATION_TO_SPACE).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and (rules == "2024" or words.index(named[0]) >= len(words) - _LETTER_WITHIN_LAST):
        return named[0]
    if not named and "Z" in words:
        return "Z"
    # The kit searches without regard to case, so "answer is dog" gives D: kept, since published numbers rest on it.
    if rules == "current" and (match := _ANSWER_IS.search(answer)) and match[1].upper() in options:
        return match[1].upper()
    return None


def _by_text(answer: str, options: Mapping[str, str], rules: KitRules) -> str | None:
    answer = answer.lower()
    texts = {letter: str(text) for letter, text in options.items()}
    if rules != "2024" and len(answer) > 2 * sum(map(len, texts.values())):
        return None
    contained = [letter for letter, text in texts.items() if text.lower() in answer]
    return contained[0] if len(contained) == 1 else None
