"""`parrot data vendor`: make the vendored assets again from their public sources (for maintainers, not for users).

Sources: CLDR's npm packages (names and keywords, facts about languages), Unicode `emoji-test.txt` (groups), the Noto
Color Emoji font (pictures).
"""

from __future__ import annotations

import gzip
import json
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from PIL import Image, ImageFont

from parrot_sys.data.corpora.default.cldr import Cldr
from parrot_sys.data.corpora.default.concepts import ATLAS_COLUMNS, ATLAS_FILE, ATLAS_TILE, CONCEPTS_FILE
from parrot_sys.data.corpora.default.offered import (
    ASSETS,
    LANGUAGES_FOLDER,
    MORE_LANGUAGES,
    language_file,
)
from parrot_sys.data.corpora.default.pictures import draw_glyph, square
from parrot_sys.data.languages import LANGUAGES_FILE, MMMB_LANGUAGES
from parrot_sys.errors import DataError
from parrot_sys.files import errors_named
from parrot_sys.paths import INPUT_FILE, INPUT_FOLDER, NEW_FILE, OUTPUT_FOLDER

_NOTO_BITMAP_SIZE = 109  # the only size the bitmap font holds
_MAX_KEYWORDS = 6
_FEW_KEYWORDS = 3  # of a language that is not a default one; an answer has as many
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
    """The npm packages cldr-annotations-full, -core, -localenames-full and -misc-full, all unpacked into one folder
    (which holds `annotations/`, `main/`, `supplemental/`)."""
    emoji_test: Annotated[Path, INPUT_FILE] = Path("/usr/share/unicode/emoji/emoji-test.txt")
    """Unicode's emoji-test.txt (Debian package unicode-data)."""
    noto_font: Annotated[Path, INPUT_FILE] = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
    """Noto Color Emoji as a bitmap font (Debian package fonts-noto-color-emoji)."""
    output: Annotated[Path, OUTPUT_FOLDER] = ASSETS
    """Folder that receives the concepts, the atlas and a file for each further language."""
    languages_file: Annotated[Path, NEW_FILE] = LANGUAGES_FILE
    """File that receives the facts about languages."""
    languages: tuple[str, ...] = MORE_LANGUAGES
    """Languages beyond the default ones to write names in."""


def vendor(config: VendorConfig) -> int:
    """Write the concepts, the picture atlas, the languages; returns the number of concepts.

    Raises:
        DataError: a source file is missing, or CLDR lacks something of a language.
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
    cldr = Cldr(config.cldr)
    with errors_named(f"{config.cldr} or {config.emoji_test}", DataError):
        concepts = list(_distinct(_concepts(cldr, config.emoji_test)))
        languages = {code: language_content(cldr, code, concepts) for code in config.languages}
        facts = cldr.facts()
    payload = json.dumps({"concepts": concepts}, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    config.output.mkdir(parents=True, exist_ok=True)
    (config.output / CONCEPTS_FILE).write_bytes(_packed(payload))
    (config.output / LANGUAGES_FOLDER).mkdir(exist_ok=True)
    for code, content in languages.items():
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
        language_file(code, config.output).write_bytes(_packed(text))
    text = json.dumps(facts, ensure_ascii=False, indent=0, separators=(",", ":"), sort_keys=True)
    config.languages_file.write_text(text + "\n", encoding="utf-8")
    with errors_named(config.noto_font, DataError):
        atlas = _atlas([concept["emoji"] for concept in concepts], config.noto_font)
    atlas.save(config.output / ATLAS_FILE, quality=55, alpha_quality=10, method=6)
    return len(concepts)


def _packed(text: str) -> bytes:
    return gzip.compress(text.encode(), 9, mtime=0)


def language_content(cldr: Cldr, language: str, concepts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Vendored file of a language: names and some keywords of the concepts, and what prompts are made of.

    Raises:
        DataError: a concept has no name, or that of another one, or CLDR lacks a word that prompts need.
    """
    annotations = cldr.annotations(language)
    entries = [annotations.get(concept["emoji"], {}) for concept in concepts]
    first: dict[str, str] = {}
    for concept, entry in zip(concepts, entries, strict=True):
        emoji, name = concept["emoji"], entry.get("tts", [""])[0]
        same = first.setdefault(unicodedata.normalize("NFKC", name).casefold().strip(), emoji)
        if not name or same != emoji:
            raise DataError(f"{language} has no name of its own for {emoji}, got {name!r}")
    return {
        "names": [entry["tts"][0] for entry in entries],
        "keywords": [_keywords(entry, entry["tts"][0], _FEW_KEYWORDS) for entry in entries],
        "cldr": cldr.phrases(language),
    }


def _keywords(entry: Mapping[str, Any], name: str, most: int) -> list[str]:
    return [word for word in entry.get("default", []) if word != name][:most]


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


def _concepts(cldr: Cldr, emoji_test: Path) -> Iterator[dict[str, Any]]:
    annotations = {language: cldr.annotations(language) for language in MMMB_LANGUAGES}
    for emoji, category in _emoji_with_category(emoji_test):
        entries = {language: annotations[language].get(emoji, {}) for language in MMMB_LANGUAGES}
        if all(entry.get("tts") for entry in entries.values()):
            names = {language: entry["tts"][0] for language, entry in entries.items()}
            yield {
                "emoji": emoji,
                "category": category,
                "names": names,
                "keywords": {
                    language: _keywords(entry, names[language], _MAX_KEYWORDS) for language, entry in entries.items()
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
