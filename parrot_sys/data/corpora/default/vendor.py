"""`parrot data vendor`: make the vendored assets again from their public sources (for maintainers, not for users).

Sources: npm `cldr-annotations-full` (names and keywords), Unicode `emoji-test.txt` (groups), the Noto Color Emoji font
(pictures).
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from PIL import Image, ImageFont

from parrot_sys.data.corpora.default.concepts import ATLAS_COLUMNS, ATLAS_FILE, ATLAS_TILE, CONCEPTS_FILE
from parrot_sys.data.corpora.default.pictures import draw_glyph, square
from parrot_sys.data.languages import MMMB_LANGUAGES
from parrot_sys.errors import DataError
from parrot_sys.files import errors_named
from parrot_sys.paths import INPUT_FILE, INPUT_FOLDER, OUTPUT_FOLDER

_NOTO_BITMAP_SIZE = 109  # the only size the bitmap font holds
_MAX_KEYWORDS = 6
_VARIATION_SELECTOR = "\ufe0f"

# Subgroup of emoji-test.txt (or its prefix up to `*`) -> category. Left out is what is not listed: flags, symbols,
# hearts and the like differ by a sign or a shade only, which is no question about what a picture shows.
CATEGORY_OF_SUBGROUP: Mapping[str, str] = {
    "face-*": "faces",
    "cat-face": "faces",
    "monkey-face": "faces",
    "emotion": "faces",
    "hand*": "people",
    "body-parts": "people",
    "person*": "people",
    "family": "people",
    "animal-mammal": "mammals",
    "animal-*": "other_animals",
    "plant-*": "plants",
    "food-fruit": "fruit_vegetables",
    "food-vegetable": "fruit_vegetables",
    "food-*": "dishes",
    "drink": "drinks_tableware",
    "dishware": "drinks_tableware",
    "place-*": "places",
    "hotel": "tools_household",
    "transport-ground": "vehicles",
    "transport-water": "vehicles",
    "transport-air": "vehicles",
    "sky & weather": "sky_weather",
    "event": "sports_games",
    "award-medal": "sports_games",
    "sport": "sports_games",
    "game": "sports_games",
    "arts & crafts": "sports_games",
    "clothing": "clothing",
    "sound": "music_electronics",
    "music": "music_electronics",
    "musical-instrument": "music_electronics",
    "phone": "music_electronics",
    "computer": "music_electronics",
    "light & video": "music_electronics",
    "time": "tools_household",
    "book-paper": "tools_household",
    "money": "tools_household",
    "mail": "tools_household",
    "writing": "tools_household",
    "office": "tools_household",
    "lock": "tools_household",
    "tool": "tools_household",
    "science": "tools_household",
    "medical": "tools_household",
    "household": "tools_household",
    "other-object": "tools_household",
}
_CLOCK_FACES = range(0x1F550, 0x1F568)


@dataclass(frozen=True, kw_only=True, slots=True)
class VendorConfig:
    """Folders of the sources and of the assets."""

    cldr: Annotated[Path, INPUT_FOLDER]
    """Unpacked npm package cldr-annotations-full (the folder that holds `annotations/`)."""
    emoji_test: Annotated[Path, INPUT_FILE] = Path("/usr/share/unicode/emoji/emoji-test.txt")
    """Unicode's emoji-test.txt (Debian package unicode-data)."""
    noto_font: Annotated[Path, INPUT_FILE] = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
    """Noto Color Emoji as a bitmap font (Debian package fonts-noto-color-emoji)."""
    output: Annotated[Path, OUTPUT_FOLDER] = Path(__file__).parent / "assets"
    """Folder that receives the concepts and the atlas."""


def vendor(config: VendorConfig) -> int:
    """Write the concepts and the picture atlas; returns the number of concepts.

    Raises:
        DataError: when a source file is missing.
    """
    for path in (config.cldr / "annotations", config.emoji_test, config.noto_font):
        if not path.exists():
            raise DataError(
                f"source {path} does not exist; parrot_sys/data/corpora/default/assets/README.md says where each "
                "source comes from"
            )
    for file in (config.emoji_test, config.noto_font):
        with errors_named(file, DataError):
            file.open("rb").close()
    with errors_named(f"{config.cldr} or {config.emoji_test}", DataError):
        concepts = list(_distinct(_concepts(config)))
    payload = json.dumps({"concepts": concepts}, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    config.output.mkdir(parents=True, exist_ok=True)
    (config.output / CONCEPTS_FILE).write_bytes(gzip.compress(payload.encode(), 9, mtime=0))
    with errors_named(config.noto_font, DataError):
        atlas = _atlas([concept["emoji"] for concept in concepts], config.noto_font)
    atlas.save(config.output / ATLAS_FILE, quality=55, alpha_quality=10, method=6)
    return len(concepts)


def _category(subgroup: str) -> str | None:
    exact = CATEGORY_OF_SUBGROUP.get(subgroup)
    if exact is not None:
        return exact
    for pattern, category in CATEGORY_OF_SUBGROUP.items():
        if pattern.endswith("*") and subgroup.startswith(pattern[:-1]):
            return category
    return None


def _emoji_with_category(path: Path) -> Iterator[tuple[str, str]]:
    """Fully qualified emoji of one code point, in the file's order, without skin tones, sequences and clock faces."""
    subgroup = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# subgroup:"):
            subgroup = line.split(":", 1)[1].strip()
        elif "; fully-qualified" in line:
            emoji = "".join(chr(int(code, 16)) for code in line.split(";")[0].split()).replace(_VARIATION_SELECTOR, "")
            category = _category(subgroup)
            if len(emoji) == 1 and category is not None and ord(emoji) not in _CLOCK_FACES:
                yield emoji, category


def _concepts(config: VendorConfig) -> Iterator[dict[str, Any]]:
    annotations = {
        language: json.loads((config.cldr / "annotations" / language / "annotations.json").read_text(encoding="utf-8"))[
            "annotations"
        ]["annotations"]
        for language in MMMB_LANGUAGES
    }
    for emoji, category in _emoji_with_category(config.emoji_test):
        entries = {language: annotations[language].get(emoji, {}) for language in MMMB_LANGUAGES}
        if all(entry.get("tts") for entry in entries.values()):
            names = {language: entry["tts"][0] for language, entry in entries.items()}
            yield {
                "emoji": emoji,
                "category": category,
                "names": names,
                "keywords": {
                    language: [word for word in entry.get("default", []) if word != names[language]][:_MAX_KEYWORDS]
                    for language, entry in entries.items()
                },
            }


def _distinct(concepts: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Leave out a concept whose name in any language was used before: two right answers would be possible."""
    seen: dict[str, set[str]] = {language: set() for language in MMMB_LANGUAGES}
    for concept in concepts:
        names = {language: name.casefold() for language, name in concept["names"].items()}
        if not any(names[language] in seen[language] for language in MMMB_LANGUAGES):
            for language in MMMB_LANGUAGES:
                seen[language].add(names[language])
            yield concept


def _atlas(emoji: list[str], font_path: Path) -> Image.Image:
    font = ImageFont.truetype(str(font_path), _NOTO_BITMAP_SIZE)
    rows = math.ceil(len(emoji) / ATLAS_COLUMNS)
    atlas = Image.new("RGBA", (ATLAS_COLUMNS * ATLAS_TILE, rows * ATLAS_TILE), (255, 255, 255, 0))
    for index, character in enumerate(emoji):
        tile = square(draw_glyph(font, character), margin=0.03).resize(
            (ATLAS_TILE, ATLAS_TILE), Image.Resampling.LANCZOS
        )
        atlas.paste(tile, (index % ATLAS_COLUMNS * ATLAS_TILE, index // ATLAS_COLUMNS * ATLAS_TILE))
    return atlas
