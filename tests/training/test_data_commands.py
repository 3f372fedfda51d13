"""`parrot data check`, `index` and `describe` take every data set that `parrot train` takes, addresses too."""

from __future__ import annotations

from pathlib import Path

import pytest

from parrot_sys.training import data_check, data_describe, data_index
from tests.data.comparing import PICTURES, record
from tests.data.record_sets import KINDS
from tests.data.remote_pictures import Place

MODEL = Path(__file__).parents[1] / "fixtures" / "parrot_tiny" / "model"
FILES = {f"{i}.png": PICTURES[i] for i in (0, 2)}
RECORDS = [record(i, sorted(FILES)[: i % 3]) for i in range(6)]
COMMANDS = {"check": data_check.main, "index": data_index.main, "describe": data_describe.main}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["json", "parquet", "webdataset", "mapped"])
@pytest.mark.parametrize("address", ["", "memory://"])
def test_data_sets_are_read(tmp_path, capsys, command, kind, address):
    named = Place(tmp_path, address and f"{address}{tmp_path.name}").name(KINDS[kind](tmp_path / "set", RECORDS, FILES))
    options = ["--checkpoint.load-from", str(MODEL), "--data.cache-dir", str(tmp_path / "cache")]
    options += ["--output", str(tmp_path / "index")] if command == "index" else []
    assert COMMANDS[command]([named, *options]) == 0
    printed = capsys.readouterr().out
    wanted = {"check": "Training would start", "index": "6 records of", "describe": "| all |  | 6 | 6 |"}
    assert wanted[command] in printed
