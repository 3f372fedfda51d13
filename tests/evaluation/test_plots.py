"""Plots: names in every script, scales with what to compare with, rounded labels; read from the figures themselves."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.text import Text

from parrot_sys import fonts, heat_maps
from parrot_sys.evaluation import plots
from parrot_sys.fonts import Lettering, explain_numbers

CHINESE, ARABIC, RUSSIAN = "\u52a8\u7269", "\u062d\u064a\u0648\u0627\u0646", "\u0437\u0432\u0435\u0440\u0438"


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved; a character that no font has is an error."""
    saved: list[Figure] = []
    real = Figure.savefig

    def save(figure: Figure, path: Path, **more: object) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            real(figure, path, **more)
        saved.append(figure)

    monkeypatch.setattr(Figure, "savefig", save)
    return saved


@pytest.fixture
def no_chinese(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without fonts for Chinese."""
    fonts.families_for.cache_clear()
    monkeypatch.setattr(fonts, "_candidates", lambda: ())
    yield
    fonts.families_for.cache_clear()


@pytest.fixture
def chinese_font(tmp_path: Path) -> Iterator[str]:
    """A font that has the two characters, and that Matplotlib has not seen; its name."""
    square = TTGlyphPen(None)
    square.moveTo((0, 0))
    for corner in ((0, 900), (900, 900), (900, 0)):
        square.lineTo(corner)
    square.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *(f"u{ord(character):x}" for character in CHINESE)])
    builder.setupCharacterMap({ord(character): f"u{ord(character):x}" for character in CHINESE})
    glyph = square.glyph()
    builder.setupGlyf({".notdef": glyph, **{f"u{ord(character):x}": glyph for character in CHINESE}})
    builder.setupHorizontalMetrics(dict.fromkeys(builder.font.getGlyphOrder(), (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Test Han", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "han.ttf")
    manager = font_manager.fontManager
    before = list(manager.ttflist)
    manager.ttflist[:] = [font for font in before if "DejaVu Sans" in font.name]
    manager.addfont(tmp_path / "han.ttf")
    fonts.families_for.cache_clear()
    yield "Test Han"
    manager.ttflist[:] = before
    fonts.families_for.cache_clear()


def heat_map(rows: Mapping[str, Mapping[str, float]], path: Path, **more: object) -> Mapping[str, str]:
    settings = {
        "name": "style", "title": "accuracy", "x_label": "language", "color_label": "accuracy (%)",
        "limits": (0.0, 100.0), "mark": ("guessing", 25.0), "digits": 0, "path": path / "map.png", **more,
    }  # fmt: skip
    return heat_maps.heat_map(rows, **settings)  # type: ignore[arg-type]


def texts(figure: Figure) -> list[str]:
    return [each.get_text() for each in figure.findobj(Text) if isinstance(each, Text) and each.get_text()]


def test_names_are_drawn_where_a_font_has_them(chinese_font: str, tmp_path: Path, figures: list[Figure]) -> None:
    legend = heat_map({CHINESE: {"zh": 50.0}, ARABIC: {"zh": 12.5}, RUSSIAN: {"zh": 62.5}}, tmp_path)
    assert legend == {}
    assert {CHINESE, ARABIC, RUSSIAN} <= set(texts(figures[0]))
    families = {tuple(each.get_fontfamily()) for each in figures[0].findobj(Text) if isinstance(each, Text)}
    assert families == {("DejaVu Sans", chinese_font)}


@pytest.mark.usefixtures("no_chinese")
def test_names_that_no_font_has_are_numbers_which_the_report_explains(tmp_path: Path, figures: list[Figure]) -> None:
    legend = heat_map({CHINESE: {"zh": 50.0}, ARABIC: {"zh": 12.5}, f"{CHINESE} 2": {"zh": 1.0}}, tmp_path)
    assert legend == {"[1]": CHINESE, "[2]": f"{CHINESE} 2"}
    shown = texts(figures[0])
    assert {"[1]", "[2]", ARABIC} <= set(shown)
    assert not any(CHINESE in text for text in shown)
    assert explain_numbers(legend) == f"No font on this machine has the characters of [1] {CHINESE}, [2] {CHINESE} 2"
    assert explain_numbers({}) == ""


@settings(max_examples=40, deadline=None)
@given(names=st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=4))
def test_any_text_is_drawn_or_explained(names: list[str]) -> None:
    letters = Lettering(names)
    for name in names:
        line = " ".join(name.split())
        drawn = letters.draw(name)
        assert drawn == line or letters.legend[drawn] == line
        assert letters.draw(name) == drawn
    assert len(set(letters.legend)) == len(set(letters.legend.values()))


def test_dollars_are_no_formulas(tmp_path: Path, figures: list[Figure]) -> None:
    name = "costs $5 or $\\frac{"
    assert heat_map({name: {"en": 1.0}}, tmp_path) == {}
    assert name in texts(figures[0])


def test_heat_map_shows_its_scale_and_the_value_to_compare_with(tmp_path: Path, figures: list[Figure]) -> None:
    heat_map(
        {"en": {"1": 0.5, "2": 0.3, "3": 0.2}}, tmp_path,
        limits=(0.0, 2 / 3), mark=("uniform", 1 / 3), digits=2, color_label="weight",
    )  # fmt: skip
    scale = figures[0].axes[1]
    assert [label.get_text() for label in scale.get_yticklabels()] == ["0.00", "0.17", "0.33", "0.50", "0.67"]
    assert "uniform\n0.33" in texts(figures[0])
    assert any(line.get_ydata()[0] == pytest.approx(1 / 3) for line in scale.get_lines())
    assert scale.get_ylabel() == "weight"


def test_labels_are_rounded_half_up(tmp_path: Path, figures: list[Figure]) -> None:
    heat_map({"a": {"en": 62.5, "zh": 12.5}}, tmp_path, counts={"a": {"en": 8, "zh": 8}})
    assert {"63\nn=8", "13\nn=8"} <= set(texts(figures[0]))
    accuracy = {"style": {"model": {"en": 62.5, "zh": 12.5}}}
    ends = {"style": {"model": {"en": (50.0, 70.0), "zh": None}}}
    plots.accuracy_by_language(accuracy, ends, {"style": 25.0}, {"style": "(plain)"}, tmp_path / "a.png")
    assert {"63", "13"} <= set(texts(figures[1]))
    values = {"style": {"en": 83.25}}
    plots.accuracy_by_part(values, {"style": (80.0, 90.0)}, {"style": 25.0}, title="t", path=tmp_path / "p.png")
    assert "83.3" in texts(figures[2])


def test_intervals_are_drawn_from_end_to_end(tmp_path: Path, figures: list[Figure]) -> None:
    accuracy = {"style": {"model": {"en": 60.0, "zh": 30.0}, "off": {"en": 50.0}}}
    ends = {"style": {"model": {"en": (45.0, 70.0), "zh": None}, "off": {"en": (40.0, 55.0)}}}
    plots.accuracy_by_language(accuracy, ends, {"style": 25.0}, {"style": "(plain)"}, tmp_path / "a.png")
    (ax,) = [ax for ax in figures[0].axes if ax.containers]
    lines = [part for each in ax.containers if each.__class__.__name__ == "ErrorbarContainer" for part in each[2]]
    drawn = {tuple(segment[:, 1].round(6).tolist()) for line in lines for segment in line.get_segments()}
    assert drawn == {(45.0, 70.0), (40.0, 55.0)}
