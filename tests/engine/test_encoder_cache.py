"""Caches of pictures: what they tell apart, what they give back, and how much they hold."""

from __future__ import annotations

import io
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from parrot_sys.data.images import ImageProcessor
from parrot_sys.engine.encoder_cache import EncoderCache, TensorCache, pixels_digest
from parrot_sys.errors import ConfigError


def file_of(picture: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", **options)
    return file.getvalue()


PROCESSOR = ImageProcessor(height=12, width=12, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def digest_of(picture: Image.Image, **options: object) -> bytes:
    """Of a picture that comes as a file, as requests bring it."""
    return pixels_digest(torch.from_numpy(PROCESSOR(file_of(picture, **options))))


def stripes(width: int, height: int) -> Image.Image:
    return Image.frombytes("RGB", (width, height), bytes(range(width * height * 3)))


def test_equal_bytes_of_another_size_or_mode_are_another_picture() -> None:
    pixels = bytes(range(48))
    pictures = [Image.frombytes("RGB", size, pixels) for size in ((4, 4), (2, 8), (8, 2), (16, 1))]
    pictures += [Image.frombytes("RGBA", (4, 3), pixels), Image.frombytes("L", (4, 12), pixels)]
    assert len(set(map(digest_of, pictures))) == len(pictures)


def test_what_a_person_sees_counts_and_not_how_the_file_is_written() -> None:
    picture = stripes(4, 3)
    turned = Image.Exif()
    turned[0x112] = 6
    hidden = picture.convert("RGBA")
    hidden.putpixel((0, 0), (9, 9, 9, 0))
    other = hidden.copy()
    other.putpixel((0, 0), (77, 7, 7, 0))
    digests = {
        "plain": digest_of(picture),
        "compressed": digest_of(picture, compress_level=9),
        "opaque": digest_of(picture.convert("RGBA")),
        "turned": digest_of(picture, exif=turned),
        "turned pixels": digest_of(picture.transpose(Image.Transpose.ROTATE_270)),
        "hidden": digest_of(hidden),
        "other colours hidden": digest_of(other),
    }
    assert digests["plain"] == digests["compressed"] == digests["opaque"]
    assert digests["turned"] == digests["turned pixels"] != digests["plain"]
    assert digests["hidden"] == digests["other colours hidden"] != digests["plain"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=12, max_size=12), st.integers(0, 11), st.integers(1, 255))
def test_every_pixel_counts(values: list[int], place: int, change: int) -> None:
    changed = list(values)
    changed[place] ^= change
    first, second = (torch.tensor(own, dtype=torch.float32).view(3, 2, 2) for own in (values, changed))
    assert pixels_digest(first) == pixels_digest(first.clone().transpose(1, 2).contiguous().transpose(1, 2))
    assert len(set(map(pixels_digest, (first, second, first.view(3, 4, 1), first.bfloat16().half())))) == 4
    assert pixels_digest(first.bfloat16()) == pixels_digest(first.bfloat16())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 8)), max_size=30))
def test_holds_what_was_used_last_and_no_more_bytes_than_it_may(size: int, calls: list[tuple[bool, int, int]]) -> None:
    cache: TensorCache[int] = TensorCache(4 * size)
    model: OrderedDict[int, int] = OrderedDict()
    hits = 0
    for is_put, key, numbers in calls:
        if is_put:
            whole = torch.arange(20.0) + key
            cache.put(key, (whole[:numbers], whole[:1]))
            model.pop(key, None)
            if numbers + 1 <= size:
                while sum(model.values()) + numbers + 1 > size:
                    model.popitem(last=False)
                model[key] = numbers + 1
        else:
            found = cache.get(key)
            assert (found is not None) == (key in model)
            if found is not None:
                hits += 1
                model.move_to_end(key)
                assert torch.equal(found[0], torch.arange(20.0)[: model[key] - 1] + key)
                assert all(part.untyped_storage().nbytes() == 4 * part.numel() for part in found)
        assert cache.num_bytes == 4 * sum(model.values()) <= cache.max_bytes
        assert len(cache) == len(model)
    assert cache.counts.hits == hits
    cache.clear()
    assert cache.num_bytes == len(cache) == 0


def test_sizes_and_both_caches() -> None:
    with pytest.raises(ConfigError, match="must be >= 0, got -1"):
        TensorCache(-1)
    cache = EncoderCache(feature_bytes=100, routed_bytes=100)
    cache.features.put(b"cat", (torch.ones(3),))
    cache.routed.put((b"cat", b"where"), (torch.ones(3), torch.ones(2)))
    assert cache.routed.get((b"cat", b"what")) is None
    assert cache.features.get(b"cat") is not None
    cache.clear()
    assert len(cache.features) == len(cache.routed) == 0
