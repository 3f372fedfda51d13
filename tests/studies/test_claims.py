"""The table of docs/evidence.md: verdicts follow from intervals, figures from kept results, and the page from both."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from experiment import choose
from studies.catalog import EXPERIMENTS
from studies.claims import CLAIMS
from studies.evidence import AIM, ALLOWANCE, NOT_RUN, Claim, Difference, Direction, Estimate, Information, place, render
from studies.measures import EXCEPT_EN

ROOT = Path(__file__).parents[2]
FIGURE = Difference(file="some.json", comparison="a - b", part="style")


def claim(direction: Direction, figure: Difference = FIGURE) -> Claim:
    return Claim(says="more", of="all", figure=figure, direction=direction, study="some")


def estimate(low: float, high: float) -> Estimate:
    return Estimate(value=(low + high) / 2, interval=(low, high), over="seeds", n=9, seeds=3)


@given(st.floats(-9, 9), st.floats(0, 9))
def test_verdicts_follow_from_the_interval(low: float, width: float) -> None:
    high = low + width
    more = claim("more").verdict(estimate(low, high))
    assert more == claim("less").verdict(estimate(-high, -low))
    assert (more == "holds here") == (low > 0)
    assert (more == "contradicts") == (high < 0)
    assert (more == "too few data to say") == (low <= 0 <= high and high > AIM)
    kept = claim("not less").verdict(estimate(low, high))
    assert (kept == "contradicts") == (high < -ALLOWANCE)
    assert (kept == "holds here") == (low > -ALLOWANCE)
    assert (kept == "too few data to say") == (low < -AIM and high >= -ALLOWANCE)


def test_a_difference_below_what_means_something_contradicts() -> None:
    told = Claim(says="more", of="all", figure=FIGURE, direction="more", study="some", least=0.1)
    assert [told.verdict(estimate(*ends)) for ends in ((0.0, 0.05), (0.0, 0.2), (0.2, 0.3))] == [
        "contradicts",
        "does not show at this size",
        "holds here",
    ]


def test_what_is_missing_has_no_verdict(tmp_path: Path) -> None:
    """No file, a file without the cells, a comparison without an interval."""
    rows = [claim("more")]
    assert any(NOT_RUN in line and "| - |" in line for line in render({"Paper": rows}, tmp_path))
    (tmp_path / "some.json").write_text(json.dumps({"summary": {"paired_intervals": {}}, "results": {}}))
    assert any(NOT_RUN in line for line in render({"Paper": rows}, tmp_path))
    alone = Estimate(value=3.0, interval=None, over="pictures", n=4, seeds=1)
    assert claim("more").verdict(alone) == "does not show (no interval)"
    assert str(alone) == "+3.0 points [no interval] over pictures; 1 seed, n = 4"
    assert "`a - b`: all" in "".join(render({"Paper": rows}, tmp_path))


def test_figures_by_hand() -> None:
    paired = {"difference": 2.0, "interval": [-1.0, 5.0], "n": 40, "pictures": 10, "seeds": 2}
    new = {"summary": {"paired_intervals": {"a - b": {"style": {"mean": paired, EXCEPT_EN: {**paired, "n": 30}}}}}}
    assert str(FIGURE.read(new)) == "+2.0 points [-1.0 to +5.0] over questions and seeds; 2 seeds, n = 40"
    others = Difference(file="some.json", comparison="a - b", part="style", key=EXCEPT_EN).read(new)
    assert others is not None
    assert others.n == 30

    told = {"language": {"bits": 2.3, "by_chance": 0.3, "most": 2.5849}}
    counts = {"n": {"style": {"en": 5, "pt": 7}}}
    runs = {"0": {"routes": {"style": told}, **counts}, "1": {"routes": {"style": told}, **counts}}
    figure = Information(file="some.json", variant="default", part="style")
    assert str(figure.read({"results": {"default": runs}})) == (
        "+2.00 bits of 2.58 [+2.00 to +2.00] over seeds; 2 seeds, n = 24"
    )
    assert figure.read({"results": {"default": {"0": {"routes": {}}}}}) is None


def test_claims_name_what_studies_make() -> None:
    for row in itertools.chain(*CLAIMS.values()):
        experiment = EXPERIMENTS[row.study]
        assert row.figure.file == experiment.file
        assert choose(experiment, row.figure.row, ())


def test_the_page_shows_the_kept_results() -> None:
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert place(page, render(CLAIMS, ROOT / "benchmarks" / "results" / "cpu")) == page, "run python train/evidence.py"
