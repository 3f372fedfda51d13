"""Tables of every report in Markdown, and the numbers in them: text stays inside its cell, halves are rounded up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import ROUND_HALF_UP, Context, Decimal

_DIGITS = 12
"""Significant digits that count: the 58.349999999999994 that a mean of floats gives for 58.35 is a half."""
_WIDEST = 16
"""Columns of a table that a page holds."""
_ANY = Context(prec=400)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True) -> list[str]:
    """Lines of a Markdown table.

    Args:
        header: names of the columns.
        rows: cells as text; a line break becomes a space, and a bar stays a bar of the text.
        numbers: columns after the first are aligned to the right.
    """
    marks = ["---", *["---:" if numbers else "---"] * (len(header) - 1)]
    lines = [[_cell(cell) for cell in row] for row in (header, *rows)]
    return [f"| {' | '.join(row)} |" for row in (lines[0], marks, *lines[1:])]


def language_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """`table` with a column a language, or, where there are more columns than a page holds, a row a language."""
    if len(header) <= _WIDEST:
        return table(header, rows)
    first, *others = zip(header, *rows, strict=True)
    return table(first, others)


def fixed(value: float | None, digits: int, *, sign: bool = False) -> str:
    """A number with so many decimals, halves away from zero (62.5 is 63, not Python's 62); a dash for none."""
    if value is None or not math.isfinite(value):
        return "-"
    exact = Decimal(f"{value:.{_DIGITS}g}").quantize(Decimal((0, (1,), -digits)), ROUND_HALF_UP, _ANY)
    return f"{_ANY.add(exact, 0):{'+' if sign else ''}f}"  # adding 0 takes the minus from a zero


def percent(value: float | None, interval: Sequence[float] | None = None) -> str:
    """A percentage with one decimal, and its interval in brackets; a dash where there is no number."""
    if interval is None or value is None:
        return fixed(value, 1)
    return f"{fixed(value, 1)} {interval_text(interval)}"


def interval_text(interval: Sequence[float] | None) -> str:
    """Both ends with one decimal, in brackets; a dash for none."""
    return "-" if interval is None else f"[{fixed(interval[0], 1)}, {fixed(interval[1], 1)}]"


def p_value(p: float) -> str:
    """A probability with three decimals, or that it is below the smallest of these."""
    return "< 0.001" if p < 0.001 else fixed(p, 3)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
