# ruff: noqa: RUF001 -- letters of other scripts are what this file is about
"""Reading an option from answers that the public kit's rules cannot read: other scripts, other punctuation.

The kit splits an answer at white space and a few ASCII marks, so that the letter in `答案是A` or `الإجابة: ب` is none
of its words. The rules here are tried where the kit's find nothing, each on the text in Unicode's compatibility
form (full-width letters and marks become plain ones):

1. The text after "the answer is" in one of MMMB's languages.
2. The one option letter that has no other Latin letter or digit beside it. A vowel before a word in small letters is a
   word of its own ("A cat", "O gato"), not an option.
3. The one Arabic letter that stands alone, in the order of Arabic exams (alif, ba, jim, dal, ha, waw: A to F).
4. The one option whose text is in the answer, unless the answer is more than twice as long as all options.

A rule that finds two different options finds none.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping

_ANSWER_PHRASES = (
    r"answer\s+is|answer\s*[:=]|option\s*[:=]?",
    r"答案\s*(?:应该|应当|应)?\s*(?:是|为|选|[:=])|(?:应该选|应选|正确选项是|我选|选择|选项|选)\s*[:=]?",
    r"(?:resposta|op[çc][ãa]o|alternativa)(?:\s+(?:correta|certa))?\s*(?:é|[:=])?",
    r"(?:ال)?(?:[إا]جابة|جواب|خيار)(?:\s+الصحيحة?)?\s*(?:هي|هو|[:=])?",
    r"(?:cevap|yanıt|seçenek)(?:\s+olarak)?\s*[:=]?",
    r"(?:ответ|вариант)(?:\s+ответа)?\s*(?:[:=]|это)?",
)
_LATIN = r"0-9A-Za-z\u00c0-\u024f_"
_LETTER = rf"(?<![{_LATIN}])[A-Z](?![{_LATIN}])"
_WORD = r"(?![AEIO]\s+[a-z\u00df-\u024f])"
_OR = rf"(?!\s*(?:[,/、]|或|和|or|and|ou|e|veya|ve|или|и|أو)\s*(?:{_LETTER}))"
_ARABIC = dict(zip("أبجدهو", "ABCDEF", strict=True)) | {"ا": "A"}
_ARABIC_LETTER = rf"(?<!\w)[{''.join(_ARABIC)}](?=\u0640?(?!\w))"
_LETTERS = re.compile(_WORD + _LETTER)
_ARABIC_LETTERS = re.compile(_ARABIC_LETTER)
_BETWEEN = r"[\s\"'*()\[\]{}<>«»“”‘’「」『』《》【】:-]*"
_AFTER_PHRASE = re.compile(
    rf"(?i:{'|'.join(_ANSWER_PHRASES)}){_BETWEEN}(?:(?P<latin>{_LETTER}){_OR}|(?P<arabic>{_ARABIC_LETTER}))"
)


def lenient_option(answer: str, options: Mapping[str, str]) -> str | None:
    """Letter of `options` that `answer` names by the rules of this module, None where they find nothing."""
    text = unicodedata.normalize("NFKC", answer)
    phrases = (match["latin"] or match["arabic"] for match in _AFTER_PHRASE.finditer(text))
    found = (
        _one((_ARABIC.get(letter, letter) for letter in phrases), options)
        or _one(_LETTERS.findall(text), options)
        or _one((_ARABIC[letter] for letter in _ARABIC_LETTERS.findall(text)), options)
    )
    return found or _by_text(text, options)


def _one(letters: Iterable[str], options: Mapping[str, str]) -> str | None:
    named = {letter for letter in letters if letter in options}
    return named.pop() if len(named) == 1 else None


def _by_text(text: str, options: Mapping[str, str]) -> str | None:
    text = text.casefold()
    texts = {letter: unicodedata.normalize("NFKC", str(each)).casefold() for letter, each in options.items()}
    if len(text) > 2 * sum(map(len, texts.values())):
        return None
    contained = [letter for letter, each in texts.items() if each in text]
    return contained[0] if len(contained) == 1 else None
