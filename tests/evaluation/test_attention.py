"""`parrot attention` as a command, and the correlation over layers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from parrot_sys.errors import DataError
from parrot_sys.evaluation.attention import WHERE, main, pearson
from parrot_sys.megatron.runtime.initialize import shutdown
from tests.evaluation.tables import picture, write_table

CHECKPOINT = Path(__file__).parents[1] / "fixtures" / "parrot_tiny" / "model"
ROW = {"question": "What is it?", "A": "cat", "B": "dog", "answer": "A"}


@pytest.fixture(scope="module", autouse=True)
def _groups() -> Iterator[None]:
    yield
    shutdown()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"index": 1, "split": "T", "history": "[]", "image": None},
        {"index": 2, "split": "V", "history": "[]", "image": picture()},
        {"index": 3, "split": "TV", "history": '[["a?", "b"]]', "image": 2},
        {"index": 4, "split": "TV", "history": '[["c?", "d e f g"]]', "image": 2},
    ]
    data = write_table(tmp_path / "iit_en.tsv", [{**ROW, **row} for row in rows])
    out = tmp_path / "out"
    flags = ["--data", str(data), "--output", str(out), "--batch-size", "1"]
    assert main(["--checkpoint", str(CHECKPOINT), *flags]) == 0
    content = json.loads((out / "attention.json").read_text(encoding="utf-8"))
    assert {name: part["n"] for name, part in content["parts"].items()} == {"V": 1, "TV": 2}
    for part in content["parts"].values():
        for layer in part["layers"]:
            assert sum(layer[where] for where in WHERE) == pytest.approx(1, abs=1e-5)
            assert all(layer[where] > 0 for where in WHERE)  # the system prompt stands before every image
    assert (out / "attention.png").is_file()
    assert "## TV (n = 2)" in capsys.readouterr().out


def test_tables_without_pictures_are_refused(tmp_path: Path) -> None:
    data = write_table(tmp_path / "iit_en.tsv", [{**ROW, "index": 1, "history": "[]", "image": None}])
    with pytest.raises(DataError, match=r"no question in .* has a picture"):
        main(["--checkpoint", str(CHECKPOINT), "--data", str(data), "--output", str(tmp_path / "out")])


def test_correlation_over_layers() -> None:
    assert pearson([1, 2, 3], [6, 4, 2]) == pytest.approx(-1)
    assert pearson([1, 2], [2, 1]) is None
    assert pearson([1, 1, 1], [1, 2, 3]) is None
