"""Fonts of plots: names in any script are drawn with a font that has them, or as a number that the report explains.

DejaVu Sans, which Matplotlib brings, has Latin, Cyrillic and Arabic letters, but no Chinese, Japanese or Korean ones.
Matplotlib (from 3.11 on) shapes Arabic and orders it right to left by itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.text import Text

_BASE = "DejaVu Sans"
_PREFERRED = (
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Droid Sans Fallback",
    "PingFang SC",
    "Microsoft YaHei",
)
"""Fonts for Chinese that are tried before the others, which may hold the characters in Japanese forms."""
_UNFIT = re.compile(r"last ?resort|emoji|^cm[a-z]+10$", re.IGNORECASE)
"""Names of fonts with boxes for every character, with colours that Matplotlib does not draw, with formula symbols."""


class Lettering:
    """The texts of one plot.

    `draw(text)` gives what to draw for a text; `apply(figure)` sets the fonts once everything is in the figure.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        """
        Args:
            texts: all that will be drawn and does not come from this program, such as names of categories.
        """
        wanted = {character for text in texts for character in _one_line(text) if not character.isspace()}
        self._families, self._missing = families_for(frozenset(wanted))
        self._codes: dict[str, str] = {}

    @property
    def legend(self) -> Mapping[str, str]:
        """Labels as drawn -> the texts they stand for, of texts that no font of this machine can show."""
        return {code: text for text, code in self._codes.items()}

    def draw(self, text: str) -> str:
        """The text, or a number in brackets where no font has its characters."""
        line = _one_line(text)
        if self._missing.isdisjoint(line):
            return line
        return self._codes.setdefault(line, f"[{len(self._codes) + 1}]")

    def apply(self, figure: Figure) -> None:
        """Gives every text of the figure the fonts, and draws dollar signs as such, not as formulas."""
        for each in figure.findobj(Text):
            assert isinstance(each, Text)
            each.set_fontfamily(list(self._families))
            each.set_parse_math(False)

    def save(self, figure: Figure, path: Path | BinaryIO) -> Mapping[str, str]:
        """Writes the figure as PNG with these fonts; the legend. `path`: name of the file, or the opened file."""
        self.apply(figure)
        if isinstance(path, Path):
            path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130, format="png")
        return self.legend


def explain_numbers(legend: Mapping[str, str]) -> str:
    """A sentence on what the numbers in a plot stand for, or nothing. `legend`: of its `Lettering`."""
    names = ", ".join(f"{number} {text}" for number, text in legend.items())
    return f"No font on this machine has the characters of {names}" if names else ""


@lru_cache(maxsize=64)
def families_for(characters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """(names of fonts that together have the characters, characters that no font has)."""
    missing = {character for character in characters if ord(character) not in _charmap(font_manager.findfont(_BASE))}
    families = [_BASE]
    for name, path in _candidates() if missing else ():
        if found := {character for character in missing if ord(character) in _charmap(path)}:
            families.append(name)
            missing -= found
        if not missing:
            break
    return tuple(families), frozenset(missing)


def _candidates() -> Iterable[tuple[str, str]]:
    """(family, file) of the other fonts: those for Chinese first, those that Matplotlib has not seen yet last."""
    manager = font_manager.fontManager

    def fit() -> list[tuple[str, str]]:
        fonts = {(font.name, font.fname) for font in manager.ttflist}
        return sorted(font for font in fonts if not _UNFIT.search(font[0]))

    known = fit()
    yield from sorted(known, key=lambda font: _PREFERRED.index(font[0]) if font[0] in _PREFERRED else len(_PREFERRED))
    files = {font.fname for font in manager.ttflist}
    for path in sorted(set(font_manager.findSystemFonts()) - files):
        try:
            manager.addfont(path)
        except (OSError, RuntimeError):  # a damaged file, or a format that Matplotlib does not read
            continue
    yield from (font for font in fit() if font not in known)


@lru_cache(maxsize=1024)
def _charmap(path: str) -> frozenset[int]:
    """Code points that a font has."""
    try:
        return frozenset(font_manager.get_font(Path(path)).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


def _one_line(text: str) -> str:
    return " ".join(text.split())
