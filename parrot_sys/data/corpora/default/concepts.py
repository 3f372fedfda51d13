"""The vendored concepts: an emoji, its category, and its name and keywords in each language."""

from __future__ import annotations

import functools
import gzip
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from parrot_sys.data.corpora.default.offered import ASSETS, MORE_LANGUAGES, read_language
from parrot_sys.errors import ConfigError

CONCEPTS_FILE = "concepts.json.gz"
MIN_CONCEPTS = 6
"""Four options of a question, and two others for the turns before it."""
ATLAS_FILE = "noto_atlas_64.webp"
ATLAS_TILE = 64
ATLAS_COLUMNS = 32

L2_CATEGORY: Mapping[str, str] = {
    "faces": "people",
    "people": "people",
    "mammals": "nature",
    "other_animals": "nature",
    "plants": "nature",
    "sky_weather": "nature",
    "fruit_vegetables": "food",
    "dishes": "food",
    "drinks_tableware": "food",
    "places": "travel",
    "vehicles": "travel",
    "sports_games": "activities",
    "music_electronics": "objects",
    "clothing": "objects",
    "tools_household": "objects",
}
"""The fifteen categories and the coarser group of each (columns `category` and `l2-category` of the benchmark)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Concept:
    """One thing that a picture can show."""

    index: int
    """Position in the vendored list and in the picture atlas."""
    emoji: str
    category: str
    names: Mapping[str, str]
    """Language -> name as CLDR gives it; distinct within each language."""
    keywords: Mapping[str, tuple[str, ...]]

    @property
    def key(self) -> str:
        """Hexadecimal code point: the stem of the concept's file names."""
        return f"{ord(self.emoji):x}"

    @property
    def l2_category(self) -> str:
        """Coarser group of the category."""
        return L2_CATEGORY[self.category]


@functools.cache
def load_concepts(languages: tuple[str, ...] = ()) -> tuple[Concept, ...]:
    """All vendored concepts in Unicode's order, in the default languages and in these."""
    records = json.loads(gzip.decompress((ASSETS / CONCEPTS_FILE).read_bytes()))["concepts"]
    for language in languages:
        if language in MORE_LANGUAGES:
            held = read_language(language)
            for record, name, words in zip(records, held["names"], held["keywords"], strict=True):
                record["names"][language], record["keywords"][language] = name, words
    return tuple(
        Concept(
            index=index,
            emoji=record["emoji"],
            category=record["category"],
            names=record["names"],
            keywords={language: tuple(words) for language, words in record["keywords"].items()},
        )
        for index, record in enumerate(records)
    )


def choose_concepts(
    count: int, held_out: int, seed: int, concepts: Sequence[Concept] | None = None
) -> tuple[list[Concept], list[Concept]]:
    """Draw `count` concepts to train on and `held_out` others, both spread evenly over the categories.

    Short names are not preferred: a small decoder learns to find the asked word far sooner when names share words
    ("red apple", "red heart") than when each is a token of its own (docs/recipe.md).

    Raises:
        ConfigError: when there are fewer vendored concepts than asked for.
    """
    concepts = load_concepts() if concepts is None else concepts
    if count < MIN_CONCEPTS or held_out < 0 or count + held_out > len(concepts):
        raise ConfigError(
            f"concepts (>= {MIN_CONCEPTS}) and held_out (>= 0) must sum to at most {len(concepts)}, the vendored "
            f"concepts; got {count} and {held_out}"
        )
    generator = random.Random(f"{seed}:concepts")
    by_category: dict[str, list[Concept]] = {}
    for concept in concepts:
        by_category.setdefault(concept.category, []).append(concept)
    for members in by_category.values():
        generator.shuffle(members)
    drawn: list[Concept] = []
    while len(drawn) < count + held_out:  # one of each category in turn; small categories run out first
        for members in by_category.values():
            if members and len(drawn) < count + held_out:
                drawn.append(members.pop())
    train, unseen = drawn[:count], drawn[count:]
    return sorted(train, key=lambda c: c.index), sorted(unseen, key=lambda c: c.index)
