"""Prompts and answer clean-up of the Parrot wrapper in the public kit (VLMEvalKit, vlmeval/vlm/parrot.py)."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable

from parrot_sys.data.constants import IMAGE_TOKEN
from parrot_sys.data.languages import in_order, lookup
from parrot_sys.data.mcq_prompt import ANSWER_WITH_LETTER, build_mcq_prompt
from parrot_sys.evaluation.tsv import Question

_CJK = re.compile("[\u4e00-\u9fff]")
_AROUND = string.punctuation + string.whitespace


def question_prompt(question: Question, language: str, *, show_options: bool = True) -> str:
    """User turn of one question: image marker, newline, then hint, question, options and the instruction in `language`.
    The marker and its newline are left out where the question has no picture.

    With `show_options` False the prompt has neither options nor instruction, as sets such as HellaSwag are asked, where
    the likeliest option counts.

    In the languages that the wrapper knows, a Chinese character anywhere makes the instruction Chinese, as there; a
    table in Japanese keeps its own.
    """
    shown = [question.hint or "", question.question, *question.options.values()]
    if lookup(language, ANSWER_WITH_LETTER) and _CJK.search("".join(shown)):
        language = "zh"
    if show_options:
        text = build_mcq_prompt(question.question, question.options, language, question.hint)
    else:
        text = "\n".join(filter(None, (question.hint, question.question)))
    return text if question.image_key is None else f"{IMAGE_TOKEN}\n{text}"


def clean_answer(response: str, prompt: str) -> str:
    """The answer as the wrapper hands it on: for English prompts a letter at either end stands for the whole answer.

    Only the English instruction triggers this in the wrapper, so other languages are scored on their full answers.
    """
    answer = response.strip()
    if not prompt.endswith(ANSWER_WITH_LETTER["en"]):
        return answer
    while True:
        answer = answer.strip(_AROUND)
        if len(answer) < 2:
            return answer
        if answer[0] in string.ascii_uppercase and answer[1] in _AROUND:
            return answer[0]
        if answer[-1] in string.ascii_uppercase and answer[-2] in _AROUND:
            return answer[-1]
        if not re.search("answer is|answer:", answer.lower()):
            return answer
        answer = _after_first(answer, ("answer is", "answer:"))
        answer = _after_first(answer, ("option",))


def _after_first(answer: str, prefixes: tuple[str, ...]) -> str:
    for prefix in prefixes:
        position = answer.lower().find(prefix)
        if position >= 0:
            return answer[position + len(prefix) :]
    return answer


def other_language(language: str, held: Iterable[str]) -> str | None:
    """The language whose prompt guides the routing in the `other-language` run: the next in the order of reports.

    Args:
        language: of the question.
        held: languages that the question is there in; None where there is no other one.
    """
    order = in_order([language, *held])
    return None if len(order) == 1 else order[(order.index(language) + 1) % len(order)]
