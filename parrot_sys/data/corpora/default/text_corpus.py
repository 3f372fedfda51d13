"""Text-only conversations about the concepts' names: what the small decoder learns before any picture (stage 0)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from parrot_sys.data.corpora.default.concepts import Concept
from parrot_sys.data.corpora.default.conversations import Asker, record, text_turns


def text_conversations(
    concepts: Sequence[Concept], languages: Sequence[str], *, rounds: int, turns: int, seed: int, stage: str = "text"
) -> Iterator[dict[str, Any]]:
    """`rounds` times over all concepts in every language, `turns` questions each in a conversation."""
    for language in languages:
        for number in range(rounds):
            generator = random.Random(f"{seed}:{stage}:{language}:{number}")
            asker = Asker(language=language, pool=concepts, languages=languages, generator=generator)
            order = generator.sample(concepts, len(concepts))
            for start in range(0, len(order), turns):
                yield record(
                    f"{stage}-{language}-{number}-{start // turns}",
                    language,
                    text_turns(asker, order[start : start + turns]),
                )
