"""Pictures come out as a person sees them, whatever their mode, depth, alpha, orientation or file."""

from __future__ import annotations

import logging
import os
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from parrot_sys.data.decoding import ImageLimits, PictureNotes, load_image
from parrot_sys.data.image_files import EncodedImage
from parrot_sys.errors import ConfigError, DataError
from tests.data.picture_files import encoded, grey_tiff, noise, png

few = settings(max_examples=25, deadline=None, derandomize=True)
sides = st.integers(1, 9)
seeds = st.integers(0, 2**16)
PAPER = {"white": 255, "black": 0}


def pixels(source, **options):
    return np.asarray(load_image(source, **options)).astype(int)


def grey(source, **options):
    values = pixels(source, **options)
    assert (values == values[..., :1]).all()
    return values[..., 0]


# 16 bits, 32 bits, floats


@few
@given(sides, sides, seeds, st.sampled_from(["PNG", "TIFF", "PPM", "object"]))
def test_16_bits_keep_black_white_and_every_shade(width, height, seed, kind):
    values = np.random.default_rng(seed).integers(0, 65536, (height, width), dtype=np.uint16)
    values.flat[0] = 65535
    image = Image.fromarray(values.astype(np.int32) if kind == "PPM" else values)
    source = image if kind == "object" else encoded(image, kind)
    notes = PictureNotes()
    assert np.array_equal(grey(source, notes=notes), (values.astype(int) + 128) // 257)
    assert notes.counts() == {"more than 8 bits a pixel: scaled to 8": 1}


@few
@given(sides, sides, seeds, st.sampled_from([(12, False), (16, False), (16, True)]))
def test_grey_tiff_of_12_and_16_bits_with_black_or_white_as_zero(width, height, seed, stored):
    bits, white_is_zero = stored
    values = np.random.default_rng(seed).integers(0, 2**bits, (height, width))
    seen = np.floor(values * 255 / (2**bits - 1) + 0.5).astype(int)
    wanted = 255 - seen if white_is_zero else seen
    assert np.array_equal(grey(grey_tiff(values, bits=bits, white_is_zero=white_is_zero)), wanted)


@few
@given(sides, sides, seeds, st.sampled_from([1.0, 255.0]), st.booleans())
def test_floats_from_0_to_1_or_255(width, height, seed, white, as_file):
    values = np.random.default_rng(seed).random((height, width), dtype=np.float32) * np.float32(white)
    values.flat[0] = white
    image = Image.fromarray(values)
    wanted = np.floor(values.astype(np.float64) * 255 / white + 0.5)
    assert np.array_equal(grey(encoded(image, "TIFF") if as_file else image), wanted)


@few
@given(st.lists(st.floats(width=32), min_size=1, max_size=8))
def test_floats_are_never_clipped(values):
    array = np.array([values], dtype=np.float32)
    if np.isfinite(array).all() and array.min() >= 0 and array.max() <= 255:
        order = np.argsort(array[0], kind="stable")
        assert (np.diff(grey(Image.fromarray(array))[0][order]) >= 0).all()
    else:
        with pytest.raises(DataError, match=r"has values from .* in its float pixels; wanted 0 to 1 or 0 to 255"):
            load_image(Image.fromarray(array))


@few
@given(st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(0, 65535) | st.integers(0, 255), min_size=1, max_size=8))
def test_32_bit_integers_are_8_bits_or_16_bits_or_refused(values):
    image = Image.fromarray(np.array([values], dtype=np.int32))
    if min(values) < 0 or max(values) > 65535:
        with pytest.raises(DataError, match="in its 32-bit pixels; wanted 0 to 255 or 0 to 65535"):
            load_image(image)
    else:
        wanted = values if max(values) <= 255 else [(value + 128) // 257 for value in values]
        assert grey(image)[0].tolist() == wanted


# transparency


@few
@given(
    sides, sides, seeds, st.sampled_from(["RGBA", "LA", "PA", "P", "La", "RGBa"]), st.sampled_from(["white", "black"])
)
def test_alpha_is_laid_on_paper(width, height, seed, mode, paper):
    colours, alpha = noise(width, height, seed), noise(width, height, seed + 1, 1)[..., 0]
    alpha[:, : width // 2] = np.where(alpha[:, : width // 2] > 127, 255, 0)
    rgb = Image.fromarray(colours)
    if mode in ("LA", "La"):
        rgb = rgb.convert("L")
    if mode in ("P", "PA"):
        rgb = rgb.quantize(16)
    if mode == "P":  # one alpha for each colour of the palette
        table = noise(256, 1, seed + 2, 1)[0, :, 0]
        image, alpha = rgb.copy(), table[np.asarray(rgb)]
        image.info["transparency"] = table.tobytes()
    else:
        image = rgb.convert({"La": "LA", "RGBa": "RGBA"}.get(mode, mode))
        image.putalpha(Image.fromarray(alpha))
        image = image.convert(mode)
    shown = np.asarray(rgb.convert("RGB")).astype(float)
    share = alpha[..., None] / 255
    wanted = shown * share + PAPER[paper] * (1 - share)
    # premultiplied colours were rounded twice more, there and back: half a step and one
    allowed = 2.01 if mode in ("La", "RGBa") else 0.51
    got = pixels(image, transparency=paper)
    assert np.abs(got - wanted).max() <= allowed
    assert (got[alpha == 0] == PAPER[paper]).all()
    if mode not in ("La", "RGBa"):
        assert (got[alpha == 255] == shown[alpha == 255]).all()


@few
@given(sides, sides, seeds, st.sampled_from([1, 2, 4, 8, 16]))
def test_one_transparent_shade_of_grey_in_a_png_of_any_depth(width, height, seed, depth):
    values = np.random.default_rng(seed).integers(0, 2**depth, (height, width))
    hidden = int(values[0, 0])
    wanted = np.where(values == hidden, 255, np.floor(values * 255 / (2**depth - 1) + 0.5).astype(int))
    assert np.array_equal(grey(png(values, depth=depth, colour=0, transparent=struct.pack(">H", hidden))), wanted)


@few
@given(sides, sides, seeds, st.sampled_from([8, 16]))
def test_one_transparent_colour_in_a_png(width, height, seed, depth):
    values = np.random.default_rng(seed).integers(0, 2, (height, width, 3)) * (2**depth - 1)
    hidden = values[0, 0]
    wanted = np.where((values == hidden).all(-1, keepdims=True), 0, values >> (depth - 8))
    source = png(values, depth=depth, colour=2, transparent=struct.pack(">3H", *hidden))
    assert np.array_equal(pixels(source, transparency="black"), wanted)


def test_dropped_transparency_is_what_the_file_hides_and_is_said(caplog):
    ink = np.zeros((4, 6, 4), np.uint8)
    ink[1:3, 1:3, 3] = 255
    source = EncodedImage(encoded(Image.fromarray(ink), "PNG"), "ink")
    with caplog.at_level(logging.INFO):
        assert pixels(source, transparency="drop").max() == 0
    assert "image ink: has transparent pixels: shown as transparency=drop says" in caplog.text
    assert (grey(source) == 255 - ink[..., 3]).all()


# modes without alpha: as Pillow converts them, which is what the released code does


@few
@given(sides, sides, seeds, st.sampled_from(["1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV"]))
def test_plain_modes(width, height, seed, mode):
    image = Image.fromarray(noise(width, height, seed))
    image = Image.frombytes("LAB", image.size, image.tobytes()) if mode == "LAB" else image.convert(mode)
    notes = PictureNotes()
    assert np.array_equal(pixels(image, notes=notes), np.asarray(image.convert("RGB")))
    assert notes.counts() == {}


@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "CMYK"), ("TIFF", "CMYK"), ("TIFF", "LAB"), ("PNG", "1")])
def test_a_grey_wedge_stays_one_in_files_of_each_mode(kind, mode):
    wedge = np.repeat(np.linspace(0, 255, 64).astype(np.uint8)[None], 16, 0)
    image = Image.fromarray(wedge).convert("RGB")
    if mode == "LAB":
        lab = np.zeros((16, 64, 3), np.uint8)
        lab[..., 0] = wedge
        image = Image.frombytes("LAB", image.size, lab.tobytes())
    seen = pixels(encoded(image.convert(mode), kind)).mean(axis=(0, 2))
    eighths = seen.reshape(8, 8).mean(axis=1)
    assert (np.diff(eighths) > 0).all()
    assert eighths[0] < 40
    assert eighths[-1] > 215


def test_an_unknown_mode_is_refused():
    image = Image.new("L", (2, 2))
    image._mode = "BGR;15"
    with pytest.raises(DataError, match=r"has the mode BGR;15, which is not supported"):
        load_image(image)


# orientation

_STORED = {  # orientation -> how an upright picture is stored
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@few
@given(sides, sides, seeds, st.sampled_from(range(1, 9)), st.sampled_from(["PNG", "WEBP", "TIFF", "JPEG"]))
def test_exif_orientation(width, height, seed, orientation, kind):
    upright = noise(width, height, seed)
    exif = Image.Exif()
    exif[0x112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(_STORED[orientation](upright)))
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    source = encoded(stored, kind, exif=exif, **options)
    notes = PictureNotes()
    assert np.abs(pixels(source, notes=notes) - upright).max() <= (8 if kind == "JPEG" else 0)
    if kind != "TIFF":  # (which Pillow turns itself)
        assert notes.counts() == ({} if orientation == 1 else {"turned as its EXIF orientation says": 1})
        assert np.abs(pixels(source, exif="ignore") - np.asarray(stored)).max() <= (8 if kind == "JPEG" else 0)


def test_pictures_of_a_kind_are_counted_and_named_once(caplog, tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    notes = PictureNotes()
    with caplog.at_level(logging.INFO):
        for i in range(3):
            (tmp_path / f"{i}.jpg").write_bytes(encoded(Image.new("RGB", (4, 3)), "JPEG", exif=exif))
            load_image(tmp_path / f"{i}.jpg", exif="ignore", notes=notes)
    assert notes.counts() == {"EXIF orientation is not applied, as exif=ignore says": 3}
    assert caplog.text.count("exif=ignore") == 1
    assert "0.jpg" in caplog.text
    with caplog.at_level(logging.INFO):
        notes.log_counts()
        notes.log_counts()
    assert caplog.text.count("3 images") == 1
    assert "3 images: EXIF orientation is not applied" in caplog.text


def test_damaged_exif_is_ignored():
    source = encoded(Image.new("RGB", (4, 3), (9, 9, 9)), "PNG", exif=b"Exif\0\0MM\0\x2a\xff\xff")
    assert load_image(source).size == (4, 3)


# several frames


@few
@given(seeds, st.sampled_from(["GIF", "WEBP", "PNG", "TIFF", "MPO"]), st.integers(1, 3))
def test_the_first_frame_is_taken(seed, kind, frames):
    pictures = [Image.new("RGB", (8, 8), tuple(noise(1, 1, seed + i)[0, 0].tolist())) for i in range(frames)]
    options = {"WEBP": {"lossless": True}, "MPO": {"quality": 100, "subsampling": 0}}
    source = encoded(pictures[0], kind, save_all=True, append_images=pictures[1:], **options.get(kind, {}))
    notes = PictureNotes()
    assert np.abs(pixels(source, notes=notes) - np.asarray(pictures[0])).max() <= (3 if kind == "MPO" else 0)
    many = frames > 1
    assert notes.counts() == ({"has several frames or pages: the first is taken": 1} if many else {})


# limits and files


def _header(width: int, height: int) -> bytes:
    """A PNG that says its size and holds no pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return start + struct.pack(">I", 1000) + b"IDAT" + b"\0" * 9


@few
@given(st.integers(1, 2**31 - 1), st.integers(1, 2**31 - 1), st.sampled_from(["bytes", "named"]))
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_header_decides_before_a_pixel_is_decoded(width, height, kind):
    limits = ImageLimits(max_pixels=10_000, max_aspect_ratio=20)
    data = _header(width, height)
    with pytest.raises(DataError) as caught:
        load_image(data if kind == "bytes" else EncodedImage(data, "of row 7"), limits=limits)
    message = str(caught.value)
    assert message.startswith("image given as bytes" if kind == "bytes" else "image of row 7")
    if width * height > 178_956_970:
        assert "DecompressionBombError" in message
    elif width * height > 10_000:
        assert f"has {width} x {height} pixels, more than image_limits.max_pixels=10000" in message
    elif max(width, height) > 20 * min(width, height):
        assert "more than image_limits.max_aspect_ratio=20" in message
    else:
        assert "cannot be read" in message


@few
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 3000), st.floats(1, 60))
def test_limits_hold_exactly(width, height, max_pixels, ratio):
    image = Image.new("RGB", (width, height))
    fits = width * height <= max_pixels and max(width, height) / min(width, height) <= ratio
    for source in (image, encoded(image, "PNG")):
        try:
            load_image(source, limits=ImageLimits(max_pixels=max_pixels, max_aspect_ratio=ratio))
            assert fits
        except DataError:
            assert not fits


@pytest.mark.parametrize("values", [{"max_pixels": 0}, {"max_pixels": 2**28}, {"max_aspect_ratio": 0.5}])
def test_limits_out_of_range(values):
    with pytest.raises(ConfigError, match=rf"image_limits\.{next(iter(values))} must be from 1 to"):
        ImageLimits(**values)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "TGA"]), st.floats(0, 1, exclude_max=True))
def test_a_cut_file_is_refused_or_whole(kind, share):
    data = encoded(Image.fromarray(noise(23, 17)), kind)
    whole = pixels(data)
    try:
        got = pixels(data[: int(share * len(data))])
    except DataError:
        return
    assert np.array_equal(got, whole)


def test_formats_that_run_programs_are_not_opened():
    with pytest.raises(DataError, match="UnidentifiedImageError"):
        load_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")


@pytest.mark.parametrize(
    ("kind", "wanted"), [("pipe", "named pipe"), ("device", "device"), ("folder", "folder"), ("socket", "socket")]
)
def test_only_regular_files_are_opened(tmp_path, kind, wanted):
    path = Path("/dev/zero") if kind == "device" else tmp_path / kind
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(path))
    with pytest.raises(DataError, match=f"is a {wanted}; wanted a regular file"):
        load_image(path)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(min_size=1, max_size=12))
def test_control_characters_in_names_are_escaped(tmp_path, name):
    for source in (str(tmp_path / "x") + name, EncodedImage(b"", name)):
        with pytest.raises(DataError) as caught:
            load_image(source)
        assert not any(ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u2028\u2029\u202e" for c in str(caught.value))
