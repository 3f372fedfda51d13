"""The table of docs/evidence.md: what the papers claim, and what the kept results of this repository say of it.

Every figure is read from a JSON that `train/experiment.py` or `train/demo.py` wrote, and every verdict follows from an
interval by one rule, so that nobody chooses the words.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Protocol

import numpy as np

from parrot_sys.evaluation.statistics import mean_margin
from parrot_sys.markdown_tables import fixed, table
from studies.measures import AVERAGE

Direction = Literal["more", "less", "not less"]
ALLOWANCE = 2.0
"""Points that count as no loss: what `not less` claims holds if the whole interval lies above minus this."""
AIM = 5.0
"""Points that would matter: an interval which reaches them and 0 says too little."""
NOT_RUN = "not run yet"
POINTS = "points"
_SAME = "\u2033"
"""In place of a claim that is that of the row above."""
BEGIN, END = "<!-- begin: python train/evidence.py -->", "<!-- end: python train/evidence.py -->"


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A difference with its 95% interval."""

    value: float
    interval: tuple[float, float] | None
    over: str
    """Things that the interval is over."""
    n: int
    """Answers, or pairs of them."""
    seeds: int
    unit: str = POINTS

    digits: int = 1

    def __str__(self) -> str:
        held = [] if self.interval is None else [fixed(end, self.digits, sign=True) for end in self.interval]
        count = f"{self.seeds} seed{'s' if self.seeds > 1 else ''}, n = {self.n}"
        value = f"{fixed(self.value, self.digits, sign=True)} {self.unit}"
        return f"{value} [{' to '.join(held) or 'no interval'}] over {self.over}; {count}"


class Figure(Protocol):
    """Something that a kept result says."""

    @property
    def file(self) -> str:
        """Name of the kept result."""

    @property
    def row(self) -> str:
        """Comparison or variant of the study, as `train/experiment.py --row` takes it."""

    def read(self, content: Mapping[str, Any]) -> Estimate | None:
        """From the content of the file; None where its cells are not there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One of the comparisons of an experiment."""

    file: str
    comparison: str
    part: str
    key: str = AVERAGE
    unit: str = POINTS

    @property
    def row(self) -> str:
        """Name of the comparison."""
        return self.comparison

    def read(self, content: Mapping[str, Any]) -> Estimate | None:
        """With the interval by pictures and seeds."""
        held = content["summary"]["paired_intervals"].get(self.comparison, {}).get(self.part, {}).get(self.key)
        if held is None:
            return None
        ends = held["interval"]
        return Estimate(
            value=held["difference"],
            interval=None if ends is None else (ends[0], ends[1]),
            over="questions and seeds" if held["seeds"] > 1 else "questions",
            n=held["n"],
            seeds=held["seeds"],
            unit=self.unit,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Information:
    """Bits that routes tell of the language beyond chance."""

    file: str
    variant: str
    part: str

    @property
    def row(self) -> str:
        """Name of the variant."""
        return self.variant

    def read(self, content: Mapping[str, Any]) -> Estimate | None:
        """I(expert; language) less what chance gives."""
        runs = [run for run in content["results"].get(self.variant, {}).values() if self.part in run["routes"]]
        told = [run["routes"][self.part]["language"] for run in runs]
        if not told:
            return None
        values = [each["bits"] - each["by_chance"] for each in told]
        n = sum(sum(run["n"][self.part].values()) for run in runs)
        return over_seeds(values, f"bits of {fixed(told[0]['most'], 2)}", n)


def over_seeds(values: Sequence[float], unit: str, n: int) -> Estimate:
    """Mean and interval of the values of seeds, by Student's t."""
    margin = mean_margin(values, np.arange(len(values))) if len(values) > 1 else math.inf
    mean = fmean(values)
    ends = (mean - margin, mean + margin) if math.isfinite(margin) else None
    return Estimate(value=mean, interval=ends, over="seeds", n=n, seeds=len(values), unit=unit, digits=2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A row of the table."""

    says: str
    """Claim of the paper."""
    of: str
    """Quantity that is compared, after the name of the row."""
    figure: Figure
    direction: Direction
    """Direction of the difference that the claim predicts."""
    study: str
    """Name of the study."""
    least: float = 0.0
    """Difference from which on it means something."""

    def verdict(self, estimate: Estimate | None) -> str:
        """One of: holds here, contradicts, does not show at this size, too few data to say, not run yet."""
        if estimate is None:
            return NOT_RUN
        if estimate.interval is None:
            return "does not show (no interval)"
        low, high = estimate.interval if self.direction != "less" else (-estimate.interval[1], -estimate.interval[0])
        enough = -ALLOWANCE if self.direction == "not less" else self.least
        if low > enough:
            return "holds here"
        if high < enough:
            return "contradicts"
        wide = high > AIM if self.direction != "not less" else low < -AIM
        return "too few data to say" if estimate.unit == POINTS and wide else "does not show at this size"


def render(claims: Mapping[str, Sequence[Claim]], results: Path) -> list[str]:
    """Markdown of all claims.

    Args:
        claims: paper -> its claims.
        results: folder with the kept results.
    """
    lines: list[str] = []
    with_interval = 0
    for paper, rows in claims.items():
        cells: list[list[str]] = []
        for claim in rows:
            path = results / claim.figure.file
            content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
            estimate = None if content is None else claim.figure.read(content)
            says = _SAME if cells and claim.says == rows[len(cells) - 1].says else claim.says
            with_interval += estimate is not None and estimate.interval is not None
            row = f"`{claim.figure.row}`: {claim.of}"
            cells.append([says, row, str(estimate or "-"), claim.verdict(estimate), claim.study])
        header = ["claim", "row: our experiment", "difference [95% interval]", "verdict", "study"]
        lines += [f"### {paper}", "", *table(header, cells, numbers=False), ""]
    by_chance = f"about {0.05 * with_interval:.0f} of them would hold or contradict by chance."
    return [*lines, f"{with_interval} rows have an interval. Were every difference 0, {by_chance}", ""]


def place(text: str, lines: Sequence[str]) -> str:
    """The page with the lines in the place of those between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n".join([f"{before}{BEGIN}", "", *lines, f"{END}{after}"])
