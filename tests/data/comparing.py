"""Pictures, records and the comparison of batches, for tests that read the same data from several places."""

from __future__ import annotations

import torch
from PIL import Image

from tests.data.picture_files import encoded, noise

ROWS = 17  # visual rows of the tiny tower
_EXIF = Image.Exif()
_EXIF[0x112] = 6
PICTURES = [
    encoded(Image.fromarray(noise(9, 7, 1)), "PNG"),
    encoded(Image.fromarray(noise(8, 40, 2)), "JPEG", exif=_EXIF),
    encoded(Image.fromarray(noise(12, 5, 3, 4)), "PNG"),
    encoded(Image.fromarray(noise(30, 30, 4)), "WEBP"),
    encoded(Image.fromarray(noise(20, 3, 5)), "BMP"),
    encoded(Image.fromarray(noise(6, 6, 6)), "PNG")[:-30],  # cut off
    encoded(Image.new("RGB", (1, 999)), "PNG"),  # over the limit of aspect ratios
]


def record(number, names):
    question = "<image>\n" * len(names) + "What is it? " * (1 + number % 3)
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"Answer {number}."}]
    return {"id": f"r{number}", "image": names, "conversations": turns}


def assert_same(steps, wanted):
    assert len(steps) == len(wanted)
    for a, b in zip([b for step in steps for b in step], [b for step in wanted for b in step], strict=True):
        assert a.record_ids == b.record_ids
        for name in ("input_ids", "labels", "label_rows", "position_ids", "cu_seqlens", "visual_rows", "pixel_values"):
            one, other = getattr(a, name), getattr(b, name)
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other), name


def ids_of(step):
    return [record_id for batch in step for record_id in batch.record_ids]
