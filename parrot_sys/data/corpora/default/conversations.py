"""Conversations of the default data set: several kinds of questions about pictures and words, in each language.

A conversation is a LLaVA/Parrot record `{id, image?, lang, conversations: [{from, value}, ...]}`. Everything drawn at
random depends on the seed, the stage and the record only, so that a data set built again is the same to the byte.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from parrot_sys.data.constants import IMAGE_TOKEN
from parrot_sys.data.corpora.default.concepts import Concept
from parrot_sys.data.corpora.default.phrases import phrases_in
from parrot_sys.data.mcq_prompt import build_mcq_prompt

LETTERS = "ABCD"
_MAX_KEYWORDS_IN_ANSWER = 3

Turn = tuple[str, str]
"""Question and answer."""


def draw_distractors(
    concept: Concept, pool: Sequence[Concept], generator: random.Random, count: int = 3
) -> list[Concept]:
    """`count` other concepts, the first of them of the concept's own category whenever the pool holds one."""
    others = [other for other in pool if other.emoji != concept.emoji]
    same = [other for other in others if other.category == concept.category]
    chosen = [generator.choice(same)] if same else []
    return chosen + generator.sample([other for other in others if other not in chosen], count - len(chosen))


@dataclass(frozen=True, kw_only=True, slots=True)
class Asker:
    """Makes turns in one language. `pool` holds the concepts that wrong options are drawn from."""

    language: str
    pool: Sequence[Concept]
    languages: Sequence[str]
    generator: random.Random

    @property
    def phrases(self) -> Mapping[str, Any]:
        """Wordings in this language."""
        return phrases_in(self.language)

    def name(self, concept: Concept) -> Turn:
        """Asks what the picture shows; the answer is the name."""
        return self.generator.choice(self.phrases["name"]), concept.names[self.language]

    def description(self, concept: Concept) -> Turn:
        """Asks the question of `name`; the long answer has name, category and keywords."""
        question, name = self.name(concept)
        words = self.words(concept)
        parts = [name, self.phrases["categories"][concept.category], *([words] if words else [])]
        return question, self.phrases["separator"].join(parts)

    def name_choice(self, concept: Concept) -> Turn:
        """The question of the benchmark: which of four names does the picture show?"""
        return self._choice_of_names(self.phrases["name"][0], concept)

    def category(self, concept: Concept) -> Turn:
        """Which category does the picture belong to? Its name."""
        return self.phrases["category"], self.phrases["categories"][concept.category]

    def category_choice(self, concept: Concept) -> Turn:
        """Which of four categories does the picture belong to?"""
        names = self.phrases["categories"]
        right = names[concept.category]
        # (Where CLDR names the categories, several share a name.)
        others = {name: category for category, name in sorted(names.items()) if name != right}
        wrong = self.generator.sample(sorted(others.values()), len(LETTERS) - 1)
        return self._choice(self.phrases["category"], right, [names[other] for other in wrong])

    def yes_no(self, concept: Concept) -> Turn:
        """Does the picture show the thing of that name?"""
        if self.generator.random() < 0.5:
            return self.phrases["yes_no"].format(name=concept.names[self.language]), self.phrases["yes"]
        other = draw_distractors(concept, self.pool, self.generator, 1)[0]
        return self.phrases["yes_no"].format(name=other.names[self.language]), self.phrases["no"]

    def keywords(self, concept: Concept) -> Turn:
        """Keywords for the picture; CLDR must have some in this language."""
        return self.phrases["keywords"], self.words(concept)

    def translation(self, concept: Concept) -> Turn:
        """A word of another language, to be said in this one."""
        source = self._source()
        question = self.phrases["translate"].format(
            name=concept.names[source], language=self.phrases["languages"][self.language]
        )
        return question, concept.names[self.language]

    def meaning_choice(self, concept: Concept) -> Turn:
        """A word of another language; its name in this language is to be found among four."""
        source = self._source()
        return self._choice_of_names(self.phrases["means"].format(name=concept.names[source]), concept)

    def riddle(self, concept: Concept) -> Turn:
        """Asks what keywords describe; the answer is the name, which CLDR often has among the keywords."""
        words = self.words(concept)
        return (
            (self.phrases["riddle"].format(words=words), concept.names[self.language])
            if words
            else self.translation(concept)
        )

    def riddle_choice(self, concept: Concept) -> Turn:
        """Which of four names do these keywords describe?"""
        words = self.words(concept)
        if not words:
            return self.meaning_choice(concept)
        return self._choice_of_names(self.phrases["riddle"].format(words=words), concept)

    def word_category(self, concept: Concept) -> Turn:
        """Which category does the word belong to?"""
        question = self.phrases["word_category"].format(name=concept.names[self.language])
        return question, self.phrases["categories"][concept.category]

    def word_keywords(self, concept: Concept) -> Turn:
        """Keywords for the word; its category where CLDR has none."""
        words = self.words(concept)
        if not words:
            return self.word_category(concept)
        return self.phrases["word_keywords"].format(name=concept.names[self.language]), words

    def _source(self) -> str:
        """Language of a word that is asked about: another than the asker's, whenever there is one."""
        others = [language for language in self.languages if language != self.language]
        return self.generator.choice(others or [self.language])

    def words(self, concept: Concept) -> str:
        """Some of the concept's keywords in this language; empty where CLDR has none."""
        words = concept.keywords[self.language]
        count = min(len(words), _MAX_KEYWORDS_IN_ANSWER)
        return self.phrases["separator"].join(self.generator.sample(words, count))

    def _choice_of_names(self, question: str, concept: Concept) -> Turn:
        wrong = draw_distractors(concept, self.pool, self.generator, len(LETTERS) - 1)
        return self._choice(question, concept.names[self.language], [other.names[self.language] for other in wrong])

    def _choice(self, question: str, right: str, wrong: Sequence[str]) -> Turn:
        texts = [right, *wrong]
        self.generator.shuffle(texts)
        options = dict(zip(LETTERS, texts, strict=True))
        # The text, not its letter: the rules of the benchmark read both, but a decoder of a few million weights learns
        # to say what it sees long before it learns to point at a letter.
        return build_mcq_prompt(question, options, self.language), right


PICTURE_TURNS: Mapping[str, tuple[float, Callable[[Asker, Concept], Turn]]] = {
    "name": (0.68, Asker.name),
    "name_choice": (0.14, Asker.name_choice),
    "yes_no": (0.03, Asker.yes_no),
    "keywords": (0.03, Asker.keywords),
    "category": (0.10, Asker.category),
    "category_choice": (0.02, Asker.category_choice),
}
"""Kinds of turns about a picture and the weights they are drawn with."""
TEXT_TURNS: Mapping[str, tuple[float, Callable[[Asker, Concept], Turn]]] = {
    "translation": (0.54, Asker.translation),
    "riddle": (0.28, Asker.riddle),
    "meaning_choice": (0.05, Asker.meaning_choice),
    "riddle_choice": (0.05, Asker.riddle_choice),
    "word_category": (0.06, Asker.word_category),
    "word_keywords": (0.02, Asker.word_keywords),
}
"""Kinds of turns about a word, without a picture."""
_NEED_WORDING = ("keywords", "word_keywords")
"""Kinds that CLDR has no words for: their phrase, of the same name, is in the written wordings only."""


def _kinds(
    asker: Asker, table: Mapping[str, tuple[float, Callable[[Asker, Concept], Turn]]]
) -> dict[Callable[[Asker, Concept], Turn], float]:
    """Kinds of a table with their weights, without those that have no wording in the asker's language."""
    absent = {kind for kind in _NEED_WORDING if kind not in asker.phrases}
    return {make: weight for kind, (weight, make) in table.items() if kind not in absent}


def picture_turns(asker: Asker, concept: Concept, *, count: int) -> list[Turn]:
    """`count` turns of different kinds about one picture: an answer that is there already teaches only to copy."""
    left = _kinds(asker, PICTURE_TURNS)
    if not concept.keywords[asker.language]:
        left.pop(Asker.keywords, None)
    turns = []
    for _ in range(count):
        (make,) = asker.generator.choices(list(left), list(left.values()))
        del left[make]
        turns.append(make(asker, concept))
    return turns


def text_turns(asker: Asker, concepts: Sequence[Concept]) -> list[Turn]:
    """One turn about each word."""
    kinds = _kinds(asker, TEXT_TURNS)
    drawn = asker.generator.choices(list(kinds), list(kinds.values()), k=len(concepts))
    return [make(asker, concept) for make, concept in zip(drawn, concepts, strict=True)]


def record(
    identifier: str, language: str, turns: Sequence[Turn], image: str | None = None, category: str = ""
) -> dict[str, Any]:
    """A LLaVA/Parrot record; the image marker is before the first question, `category` that of what it shows."""
    messages: list[dict[str, str]] = []
    for index, (question, answer) in enumerate(turns):
        marker = f"{IMAGE_TOKEN}\n" if image is not None and index == 0 else ""
        messages += [{"from": "human", "value": marker + question}, {"from": "gpt", "value": answer}]
    head: dict[str, Any] = {"id": identifier} if image is None else {"id": identifier, "image": image}
    stated = {"category": category} if category else {}
    return {**head, "lang": language, **stated, "conversations": messages}
