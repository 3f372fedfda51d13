"""docs/scaling.md against what its commands print now."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from parrot_sys.__main__ import main

_DOC = Path(__file__).parents[2] / "docs" / "scaling.md"
_PART = re.compile(r"```bash\n(parrot plan .+?)```\n\n(\|.+?)\n\n!\[.+?\]\((.+?)\)", re.DOTALL)
PARTS = [
    (shlex.split(command.replace("\\\n", " ")), table.splitlines(), figure)
    for command, table, figure in _PART.findall(_DOC.read_text())
]
NAMES = [Path(figure).stem for _, _, figure in PARTS]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def _number(cell: str) -> float:
    return float(cell.replace(",", "").rstrip("%"))


def _run(command: list[str], gpus: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Lines of the table that the command prints for these numbers of GPUs; nothing is drawn."""
    first = command.index("--scaling.gpus") + 1
    last = next(i for i in range(first, len(command)) if command[i].startswith("--"))
    plot = command.index("--plot")
    arguments = [*command[1:first], *gpus, *command[last:plot], *command[plot + 2 :]]
    assert main(arguments) == 0
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]


def test_the_doc_has_both_models_with_weak_and_strong_scaling() -> None:
    assert [f"scaling_{model}_{kind}" for model in ("7b", "64_experts") for kind in ("weak", "strong")] == NAMES
    for command, _, figure in PARTS:
        assert command[command.index("--plot") + 1] == f"docs/{figure}"
        text = (_DOC.parent / figure).read_text()
        assert "predicted by formulas, not measured" in text
        assert "4096: " in text


@pytest.mark.parametrize(("command", "table", "figure"), PARTS, ids=NAMES)
def test_rows_are_what_the_command_prints_now(
    command: list[str], table: list[str], figure: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # Few, of which the searches are short; the other rows are slow.
    title, line, *rows = _run(command, ["8", "64"] if figure == PARTS[0][2] else ["8"], capsys)
    assert table[:2] == [title, line]
    documented = {_cells(row)[0]: _cells(row)[:-1] for row in table[2:]}
    # The last column is relative to the first row.
    assert [documented[_cells(row)[0]] for row in rows] == [_cells(row)[:-1] for row in rows]
    # What the figure names its bars by.
    drawn = (_DOC.parent / figure).read_text()
    assert all(f"{gpus}: {cells[1]}, " in drawn for gpus, cells in documented.items())


@pytest.mark.parametrize("table", [table for _, table, _ in PARTS], ids=NAMES)
def test_efficiency_is_relative_to_the_first_row(table: list[str]) -> None:
    rows = [_cells(row) for row in table[2:]]
    rates = [_number(row[-3]) / _number(row[0]) for row in rows]
    for row, rate in zip(rows, rates, strict=True):
        # Both rates are rounded to three digits, the percentage to a whole number.
        assert _number(row[-1]) / 100 == pytest.approx(rate / rates[0], abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "table", "figure"), PARTS, ids=NAMES)
def test_all_rows_are_what_the_command_prints_now(
    command: list[str], table: list[str], figure: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(command, [_cells(row)[0] for row in table[2:]], capsys) == table
