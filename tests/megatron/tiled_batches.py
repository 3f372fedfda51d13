"""Micro-batches of pictures of several sizes, cut into tiles where the model wants them so."""

from __future__ import annotations

import torch

from parrot_sys.data.batch import PackedBatch
from parrot_sys.data.constants import IGNORE_ID, IMAGE_TOKEN_ID
from parrot_sys.data.packing import Sample, pack_samples
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.towers import PictureRows

SIZES = ((28, 28), (40, 90), (90, 40), (20, 61))
"""Height and width of pictures, which are taken in turn."""


def make_sample(model: ParrotConfig, prompt: int, pictures: int, answer: int, *, pixels: bool, seed: int) -> Sample:
    """`prompt` words with pictures after the first of them, then `answer` words with labels; all at random."""
    tiling, vision = model.tiling, model.vision
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, model.llm.vocab_size, (prompt + answer,), generator=generator).tolist()
    ids = [words[0], *[IMAGE_TOKEN_ID] * pictures, *words[1:]]
    labels = [IGNORE_ID] * (len(ids) - answer) + ids[len(ids) - answer :]
    sizes = [SIZES[(seed + i) % len(SIZES)] for i in range(pictures)]
    whole = PictureRows.whole(model.rows_per_image)
    rows = tuple(whole if tiling is None else tiling.rows(*size) for size in sizes)
    tiles = sum(picture.tiles for picture in rows)
    values = torch.randn(tiles, 3, vision.image_size, vision.image_size, generator=generator)
    features = torch.randn(tiles, vision.num_visual_rows, vision.hidden_size, generator=generator)
    return Sample(
        input_ids=ids,
        labels=labels,
        pixel_values=values if pixels and rows else None,
        image_features=features if rows and not pixels else None,
        pictures=rows or None,
    )


def tiled_micro_batches(model: ParrotConfig, *, pixels: bool, count: int = 4) -> list[PackedBatch]:
    """A step: samples with one, no and two pictures; one long sample; text only; nothing."""
    contents = [[(5, 1, 4), (3, 0, 6), (6, 2, 1)], [(4, 1, 9)], [(4, 0, 3), (2, 0, 5)], []]
    batches = []
    for number, content in enumerate(contents[:count]):
        samples = [
            make_sample(model, *counts, pixels=pixels, seed=10 * number + place) for place, counts in enumerate(content)
        ]
        batches.append(pack_samples(samples, num_visual_rows=model.rows_per_image))
    return batches
