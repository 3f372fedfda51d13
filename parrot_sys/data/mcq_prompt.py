"""The multiple-choice prompt that training conversations and the benchmark share.

Wording and order follow the Parrot wrapper of the public evaluation kit (VLMEvalKit, vlmeval/vlm/parrot.py): hint,
question, one line per option, then an instruction in the data set's language.
"""

from __future__ import annotations

from collections.abc import Mapping

from parrot_sys.errors import ConfigError

ANSWER_WITH_LETTER: Mapping[str, str] = {
    "en": "Answer with the option's letter from the given choices directly.",
    "zh": "请直接用给定选项中的选项字母回答。",
    "pt": "Responda diretamente com a letra da opção das escolhas dadas.",
    "ar": "أجب مباشرةً بحرف الخيار من الاختيارات المعطاة.",
    "tr": "Verilen seçeneklerden doğrudan seçeneğin harfi ile cevap verin.",
    "ru": "Ответьте буквой варианта из предложенных вариантов напрямую.",
}
"""Last line of a question with options, per language."""
_ANSWER_SHORTLY_ZH = "请用单个词或短语回答问题。"
_ANSWER_SHORTLY = "Answer the question using a single word or phrase."


def build_mcq_prompt(question: str, options: Mapping[str, str], language: str, hint: str | None = None) -> str:
    """Text of one question, without the image marker: hint, question, `A. text` and so on, instruction, a line each.

    Args:
        question: the question as the table gives it.
        options: letter -> text, in the order in which they are to be shown; empty for an open question.
        language: one of the six codes of MMMB; decides the last line.
        hint: text put on a line before the question.

    Raises:
        ConfigError: for a language without an instruction.
    """
    if language not in ANSWER_WITH_LETTER:
        raise ConfigError(f"language must be one of {', '.join(ANSWER_WITH_LETTER)}, got {language!r}")
    lines = [question] if hint is None else [hint, question]
    if options:
        lines += [f"{letter}. {text}" for letter, text in options.items()]
        lines.append(ANSWER_WITH_LETTER[language])
    else:  # the kit translates this instruction into Chinese only
        lines.append(_ANSWER_SHORTLY_ZH if language == "zh" else _ANSWER_SHORTLY)
    return "\n".join(lines)
