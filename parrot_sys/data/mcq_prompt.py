"""The multiple-choice prompt that training conversations and the benchmark share.

Wording and order follow the Parrot wrapper of the public evaluation kit (VLMEvalKit, vlmeval/vlm/parrot.py): hint,
question, one line per option, then an instruction in the data set's language. The wrapper has a wording for the
languages of MMMB only. In others the last line is a question that CLDR's pattern for "or" makes, such as
`A, B, C oder D?`, and where CLDR has none the English instruction, as in the wrapper.
"""

from __future__ import annotations

from collections.abc import Mapping

from parrot_sys.data.languages import lookup, or_question

ANSWER_WITH_LETTER: Mapping[str, str] = {
    "en": "Answer with the option's letter from the given choices directly.",
    "zh": "请直接用给定选项中的选项字母回答。",
    "pt": "Responda diretamente com a letra da opção das escolhas dadas.",
    "ar": "أجب مباشرةً بحرف الخيار من الاختيارات المعطاة.",
    "tr": "Verilen seçeneklerden doğrudan seçeneğin harfi ile cevap verin.",
    "ru": "Ответьте буквой варианта из предложенных вариантов напрямую.",
}
"""Last line of a question with options, per language that the wrapper has a wording for."""
_ANSWER_SHORTLY_ZH = "请用单个词或短语回答问题。"
_ANSWER_SHORTLY = "Answer the question using a single word or phrase."


def build_mcq_prompt(question: str, options: Mapping[str, str], language: str, hint: str | None = None) -> str:
    """Text of one question, without the image marker: hint, question, `A. text` and so on, instruction, a line each.

    Args:
        question: the question as the table gives it.
        options: letter -> text, in the order in which they are to be shown; empty for an open question.
        language: BCP 47 code; decides the last line.
        hint: text put on a line before the question.
    """
    lines = [question] if hint is None else [hint, question]
    if options:
        lines += [f"{letter}. {text}" for letter, text in options.items()]
        lines.append(
            lookup(language, ANSWER_WITH_LETTER) or or_question(list(options), language) or ANSWER_WITH_LETTER["en"]
        )
    else:  # the kit translates this instruction into Chinese only
        lines.append(_ANSWER_SHORTLY_ZH if lookup(language, {"zh": True}) else _ANSWER_SHORTLY)
    return "\n".join(lines)
