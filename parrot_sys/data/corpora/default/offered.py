"""Languages that the default data set offers, and the vendored file of each beyond the default ones."""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parrot_sys.data.languages import MMMB_LANGUAGES

ASSETS = Path(__file__).parent / "assets"
LANGUAGES_FOLDER = "languages"
# Chosen by: CLDR has a distinct name for every concept and words of the language for all that prompts are made of; then
# many speakers and many scripts. With the default ones the first 18 make a set of 24, all of them one of 48.
MORE_LANGUAGES = (
    *("es", "fr", "de", "hi", "ja", "ko", "vi", "th", "id", "fa", "he", "bn", "ta", "sw", "pl", "el", "uk", "it"),
    *("nl", "cs", "sv", "ro", "hu", "ur", "mr", "pa", "ml", "ka", "hy", "am", "fil", "ms", "az", "kk"),
    *("uz", "sr", "bg", "fi", "ne", "si", "zh-Hant", "da"),
)
"""Languages beside those of MMMB, which are the default."""
OFFERED = (*MMMB_LANGUAGES, *MORE_LANGUAGES)
"""All languages of the default data set."""


def language_file(language: str, assets: Path = ASSETS) -> Path:
    """Vendored file of one of `MORE_LANGUAGES`."""
    return assets / LANGUAGES_FOLDER / f"{language}.json.gz"


@functools.cache
def read_language(language: str) -> Mapping[str, Any]:
    """Content of the vendored file: `names` and `keywords` in the order of the concepts, `cldr` from `Cldr.phrases`."""
    return json.loads(gzip.decompress(language_file(language).read_bytes()))
