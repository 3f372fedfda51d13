"""Batches of unlike requests, and what each of them gets alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import parrot_sys
from parrot_sys.data.constants import IMAGE_TOKEN_ID
from parrot_sys.data.picture import Picture
from parrot_sys.inference.model import ParrotForConditionalGeneration
from parrot_sys.towers import PictureRows

SIZES = ((28, 28), (40, 90), (90, 40))
"""Height and width of pictures, which are taken in turn."""
FIRST, LAST = 3, 190
"""Ids of plain text in all fixtures."""


def limited(directory: Path, max_seq_len: int = 72, **options: Any) -> ParrotForConditionalGeneration:
    """A checkpoint whose requests may have `max_seq_len` rows."""
    model, _ = parrot_sys.load_pretrained(directory, **options)
    model.model.bridge.model = replace(model.config, max_seq_len=max_seq_len)
    return model


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """A request: its prompt of `length` words and `pictures`, drawn by `number`, and how it is answered."""

    number: int
    length: int
    pictures: int = 0
    new_tokens: int = 4
    fills: bool = False
    """Its prompt is made so long that prompt and answer fill the model's rows."""

    def prompt(self, model: ParrotForConditionalGeneration) -> tuple[Tensor, list[Picture]]:
        """Ids [N], and the pictures, of several sizes where they are cut into tiles."""
        config, generator = model.config, torch.Generator().manual_seed(self.number)
        side, tiling, whole = config.vision.image_size, config.tiling, PictureRows.whole(config.rows_per_image)
        sizes = [SIZES[(self.number + place) % len(SIZES)] for place in range(self.pictures)]
        rows = [whole if tiling is None else tiling.rows(*size) for size in sizes]
        room = config.max_rows - self.new_tokens - sum(len(each.source) for each in rows)
        words = room if self.fills else self.length
        ids = torch.randint(FIRST, LAST, (words,), generator=generator).tolist()
        for _ in range(self.pictures):
            ids.insert(int(torch.randint(0, len(ids) + 1, (), generator=generator)), IMAGE_TOKEN_ID)
        pictures = [Picture(torch.randn(each.tiles, 3, side, side, generator=generator), each) for each in rows]
        return torch.tensor(ids), pictures

    def continuations(self) -> list[list[int]]:
        """Two of them, of different lengths."""
        generator = torch.Generator().manual_seed(self.number + 1)
        ids = torch.randint(FIRST, LAST, (self.new_tokens,), generator=generator).tolist()
        return [ids, ids[:1]]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model says to each request: tokens up to its end, scores of its continuations, logits of its rows."""

    tokens: list[list[int]]
    scores: list[Tensor]
    rows: list[Tensor]


def ask(
    model: ParrotForConditionalGeneration,
    requests: Sequence[Mixed],
    *,
    left: bool = False,
    ends_every: int = 0,
    sampled: bool = False,
    use_cache: bool = True,
) -> Answers:
    """The answers to a batch, padded on the right or on the left with an id that is also a word."""
    prompts = [request.prompt(model) for request in requests]
    longest = max(len(ids) for ids, _ in prompts)
    ids, mask = torch.full((2, len(requests), longest), FIRST)
    for row, (own, _) in enumerate(prompts):
        place = slice(longest - len(own), None) if left else slice(len(own))
        ids[row, place], mask[row] = own, 0
        mask[row, place] = 1
    images = [picture for _, pictures in prompts for picture in pictures]
    settings: dict[str, Any] = {}
    ends = frozenset(range(0, 630, ends_every)) if ends_every else frozenset()
    if sampled:
        settings = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "seed": [each.number for each in requests]}
    output = model.generate(
        ids,
        mask,
        images,
        max_new_tokens=[each.new_tokens for each in requests],
        eos_token_id=sorted(ends),
        pad_token_id=FIRST,
        repetition_penalty=1.3,
        use_cache=use_cache,
        **settings,
    )[:, longest:]
    with torch.no_grad():
        logits = model(ids, mask, images).logits
    lengths = [
        len(own) + sum(len(picture.rows.source) - 1 for picture in own_pictures) for own, own_pictures in prompts
    ]
    return Answers(
        tokens=[_until(row.tolist(), ends, each.new_tokens) for row, each in zip(output, requests, strict=True)],
        scores=model.score(ids, [each.continuations() for each in requests], mask, images),
        rows=[rows[:length] for rows, length in zip(logits, lengths, strict=True)],
    )


def _until(tokens: list[int], ends: frozenset[int], most: int) -> list[int]:
    """An answer without what fills its row: it ends after the first of `ends`."""
    stop = next((place + 1 for place, token in enumerate(tokens[:most]) if token in ends), most)
    assert set(tokens[stop:]) <= {FIRST}, "only padding follows"
    return tokens[:stop]


def assert_alone(
    model: ParrotForConditionalGeneration, requests: Sequence[Mixed], *, rows: bool = True, **settings: Any
) -> Answers:
    """Asks a batch; each of its requests gets what it gets alone.

    Args:
        model: to ask.
        requests: the batch.
        rows: whether this holds for the rows of `forward` too.
        **settings: see `ask`.
    """
    together = ask(model, requests, **settings)
    for place, request in enumerate(requests):
        alone = ask(model, [request], **settings)
        assert together.tokens[place] == alone.tokens[0], request
        torch.testing.assert_close(together.scores[place], alone.scores[0], rtol=1e-4, atol=1e-4)
        if rows:
            torch.testing.assert_close(together.rows[place], alone.rows[0], rtol=1e-4, atol=1e-4)
    return together
