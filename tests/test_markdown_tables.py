"""Cells of Markdown tables against a Markdown parser, and rounding against fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from parrot_sys.markdown_tables import fixed, p_value, percent, table

TEXT = st.text(alphabet="ab|\\ \n\t\u732b\u0642", max_size=12)


def parsed(lines: list[str]) -> list[list[str]]:
    """Texts of the cells, row by row."""
    tokens = MarkdownIt("commonmark").enable("table").parse("\n".join(lines))
    assert tokens, lines
    assert tokens[0].type == "table_open", lines
    rows: list[list[str]] = []
    for token in tokens:
        if token.type == "tr_open":
            rows.append([])
        if token.type == "inline":
            rows[-1].append("".join(child.content for child in token.children or ()))
    return rows


@settings(max_examples=80, deadline=None)
@given(header=st.lists(TEXT, min_size=2, max_size=4), data=st.data())
def test_every_text_stays_in_its_cell(header: list[str], data: st.DataObject) -> None:
    row = st.lists(TEXT, min_size=len(header), max_size=len(header))
    rows = data.draw(st.lists(row, max_size=3))
    wanted = [[" ".join(cell.split()) for cell in each] for each in (header, *rows)]
    assert parsed(table(header, rows)) == wanted


@settings(max_examples=200, deadline=None)
@given(right=st.integers(0, 400), n=st.integers(1, 400), digits=st.integers(0, 2))
def test_halves_are_rounded_up(right: int, n: int, digits: int) -> None:
    exact = Fraction(100 * right, n)
    half_up = math.floor(exact * 10**digits + Fraction(1, 2))
    assert fixed(100 * right / n, digits) == f"{half_up // 10**digits}" + (
        f".{half_up % 10**digits:0{digits}d}" if digits else ""
    )
    assert fixed(-100 * right / n, digits).lstrip("-") == fixed(100 * right / n, digits)


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(62.5, 0, "63"), (12.5, 0, "13"), (83.25, 1, "83.3"), (58.349999999999994, 1, "58.4"), (-0.04, 1, "0.0"),
     (-0.05, 1, "-0.1"), (math.nan, 1, "-"), (None, 1, "-"), (math.inf, 1, "-"), (1e30, 1, f"{10**30}.0")],
)  # fmt: skip
def test_numbers_by_hand(value: float | None, digits: int, text: str) -> None:
    assert fixed(value, digits) == text


def test_signs_intervals_and_probabilities() -> None:
    assert [fixed(value, 1, sign=True) for value in (1.25, -1.25, 0.0, -0.01)] == ["+1.3", "-1.3", "+0.0", "+0.0"]
    assert percent(50.0, (40.25, 60.0)) == "50.0 [40.3, 60.0]"
    assert percent(50.0, None) == "50.0"
    assert percent(None, (0.0, 100.0)) == "-"
    assert [p_value(p) for p in (1.0, 0.0125, 0.00099)] == ["1.000", "0.013", "< 0.001"]
