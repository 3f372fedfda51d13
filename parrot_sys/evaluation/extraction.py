"""Which option a free-text answer names, by the rules of the public evaluation kit.

VLMEvalKit, vlmeval/utils/matching_util.py. Two published versions exist and give different numbers for the same
predictions: `2024`, the kit that Parrot's authors used, and `current`, which wants the letter near the end, also reads
"the answer is X", and gives up on long answers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from parrot_sys.errors import ConfigError

Rules = Literal["current", "2024"]

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
"""`current`: the first occurrence of the letter must be one of the last four words."""


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
    if rules not in ("current", "2024"):
        raise ConfigError(f"rules must be 'current' or '2024', got {rules!r}")
    answer = str(prediction)
    return _by_letter(answer, options, rules) or _by_text(answer, options, rules)


def _by_letter(answer: str, options: Mapping[str, str], rules: Rules) -> str | None:
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


def _by_text(answer: str, options: Mapping[str, str], rules: Rules) -> str | None:
    answer = answer.lower()
    texts = {letter: str(text) for letter, text in options.items()}
    if rules == "current" and len(answer) > 2 * sum(map(len, texts.values())):
        return None
    contained = [letter for letter, text in texts.items() if text.lower() in answer]
    return contained[0] if len(contained) == 1 else None
