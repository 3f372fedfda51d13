"""Pixel values against transformers' own image processors and against the released code's output."""

from __future__ import annotations

import io
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from parrot_sys.data import images as images_module
from parrot_sys.data.decoding import load_image
from parrot_sys.data.images import ImageProcessor
from parrot_sys.errors import ConfigError, DataError
from parrot_sys.towers.clip import CLIP_MEAN, CLIP_STD

SIZES = [(40, 40), (91, 37), (37, 91), (336, 50), (5, 7), (1, 1)]  # width, height


def picture(size, mode="RGB", seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def clip(size, *, pad):
    values = ImageProcessor.for_tower("clip", size).to_dict()
    return ImageProcessor.from_dict(values, image_aspect_ratio="pad" if pad else "square")


def test_pixel_values_equal_the_released_ones(parrot_tiny, processor):
    wanted = load_file(parrot_tiny / "expected.safetensors")["pixel_values"]
    images = processor.images([parrot_tiny / f"image_{i}.png" for i in range(4)])
    assert images.dtype == torch.float32
    assert (images - wanted).abs().max() <= 1e-6


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "1"])
def test_clip_without_padding_is_bit_equal_to_transformers(size, mode):
    image = picture(size, mode)
    reference = CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30})
    wanted = reference(image.convert("RGB"), return_tensors="np")["pixel_values"][0]
    assert np.array_equal(clip(30, pad=False)(image), wanted)


@pytest.mark.parametrize("size", SIZES)
def test_clip_with_padding_is_bit_equal_to_transformers_on_a_padded_image(size):
    image = picture(size)
    side = max(size)
    canvas = np.empty((side, side, 3), dtype=np.uint8)
    canvas[:] = (122, 116, 104)
    left, top = (side - size[0]) // 2, (side - size[1]) // 2
    canvas[top : top + size[1], left : left + size[0]] = np.asarray(image)
    reference = CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30})
    wanted = reference(Image.fromarray(canvas), return_tensors="np")["pixel_values"][0]
    assert np.array_equal(clip(30, pad=True)(image), wanted)


@pytest.mark.parametrize("size", SIZES)
def test_siglip_is_bit_equal_to_transformers(size):
    reference = SiglipImageProcessorPil(size={"height": 30, "width": 30}, resample=3)
    wanted = reference(picture(size), return_tensors="np")["pixel_values"][0]
    ours = ImageProcessor.from_dict(ImageProcessor.for_tower("siglip", 30).to_dict(), image_aspect_ratio=None)
    assert np.array_equal(ours(picture(size)), wanted)


def test_a_crop_smaller_than_the_resized_image():
    ours = ImageProcessor(height=24, width=20, shortest_edge=31, mean=CLIP_MEAN, std=CLIP_STD, pad_to_square=False)
    reference = CLIPImageProcessorPil(size={"shortest_edge": 31}, crop_size={"height": 24, "width": 20})
    image = picture((90, 44))
    assert np.array_equal(ours(image), reference(image, return_tensors="np")["pixel_values"][0])


def test_efficientnet_is_byte_minus_127_over_128():
    image = picture((32, 32))
    wanted = (np.asarray(image, dtype=np.float32) - 127) / 128
    assert np.array_equal(ImageProcessor.for_tower("efficientnet_lite0", 32)(image), wanted.transpose(2, 0, 1))


def test_efficientnet_pads_with_zeros_after_normalisation():
    result = ImageProcessor.for_tower("efficientnet_lite0", 32)(picture((32, 16)))
    assert np.abs(result[:, :8]).max() == 0
    assert np.abs(result[:, 8:24]).max() > 0


@pytest.mark.parametrize("tower", ["clip", "siglip", "efficientnet_lite0"])
def test_dict_round_trip(tower):
    ours = ImageProcessor.for_tower(tower, 64)
    assert ImageProcessor.from_dict(ours.to_dict(), image_aspect_ratio="pad") == ours


def test_old_files_with_numbers_for_sizes():
    values = clip(56, pad=True).to_dict() | {"size": 56, "crop_size": 56}
    assert ImageProcessor.from_dict(values, image_aspect_ratio="pad") == clip(56, pad=True)


@pytest.mark.parametrize(
    ("changes", "ratio", "message"),
    [
        ({}, "anyres", "image_aspect_ratio must be .* got 'anyres'"),
        ({"do_normalize": False}, "pad", "do_normalize must be true"),
        ({"do_center_crop": False}, "pad", "do_center_crop must be true"),
        ({"size": {"longest_edge": 5}}, "pad", "size must hold height and width or shortest_edge"),
        ({"size": {"shortest_edge": 20}}, "pad", "at least the crop size 30x30, got 20"),
        ({"image_mean": None}, "pad", "image_mean is missing"),
    ],
)
def test_unsupported_preprocessing_is_an_error(changes, ratio, message):
    values = {k: v for k, v in (clip(30, pad=True).to_dict() | changes).items() if v is not None}
    with pytest.raises(ConfigError, match=message):
        ImageProcessor.from_dict(values, image_aspect_ratio=ratio)


def test_sources_of_every_kind_give_the_same_pixels(parrot_tiny, processor):
    path = parrot_tiny / "image_0.png"
    images = processor.images([path, str(path), path.read_bytes(), Image.open(path)])
    assert all(torch.equal(image, images[0]) for image in images)


def test_no_images_give_an_empty_tensor(processor):
    assert processor.images([]).shape == (0, 3, 56, 56)


def test_missing_and_broken_files_are_errors_that_name_them(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.png is missing"):
        load_image(tmp_path / "nowhere.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"text\.png cannot be read: UnidentifiedImageError"):
        load_image(tmp_path / "text.png")
    buffer = io.BytesIO()
    picture((64, 64)).save(buffer, "PNG")
    with pytest.raises(DataError, match="given as bytes cannot be read"):  # the header is whole, the pixels are not
        load_image(buffer.getvalue()[:2000])


# padding and resizing in bounded memory


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(1, 80),
    st.integers(1, 80),
    st.integers(1, 40),
    st.sampled_from([0, 1, 2, 3]),
    st.integers(16, 500),
)
def test_strips_give_the_same_as_the_whole_square(width, height, side, resample, strip_pixels):
    image, color = picture((width, height), seed=width), (122, 116, 104)
    square = Image.new("RGB", (max(width, height),) * 2, color)
    square.paste(image, ((square.width - width) // 2, (square.height - height) // 2))
    wanted = square.resize((side, side), resample=resample)
    with mock.patch.object(images_module, "_STRIP_PIXELS", strip_pixels):
        got = images_module._resize_padded(image, color, (side, side), Image.Resampling(resample))
    assert np.array_equal(np.asarray(got), np.asarray(wanted))


_PEAK = """
import resource
from dataclasses import replace
from PIL import Image
from parrot_sys.data.decoding import ImageLimits
from parrot_sys.data.images import ImageProcessor
long = Image.new("RGB", {size}, (200, 30, 30))
limits = ImageLimits(max_aspect_ratio=1000)
processor = replace(ImageProcessor.for_tower("clip", 56), limits=limits, pad_to_square={pad})
processor(Image.new("RGB", (64, 48)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(processor(long).std())
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("size", [(20, 8000), (8000, 20), pytest.param((60, 40000), marks=pytest.mark.slow)])
@pytest.mark.parametrize("pad", [True, False])
def test_a_long_thin_picture_takes_little_memory(size, pad):
    code = _PEAK.format(size=size, pad=pad)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    deviation, megabytes = result.stdout.split()
    assert float(deviation) >= 0
    assert int(megabytes) < 100  # the square has at least 64 million pixels, 256 MB in Pillow
