"""Copies of the fixture of Parrot, and what other programs may write into its files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from parrot_sys.errors import ParrotError

FIXTURE = Path(__file__).parent / "fixtures" / "parrot_tiny"

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([2**70, 10**400, 1e308, 0.5, -1.0, float("nan"), float("inf")])
    | st.sampled_from(["", "2", "../..", "\0", "x" * 5000, "\ud800", "llama", "auto"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["a", "type", "factor"]), inner),
    max_leaves=4,
)
"""Values of any type, and numbers and texts that break what does not expect them."""


def copy_fixture(directory: Path) -> Path:
    """A copy of the model, its tower beside it; returns the model's directory."""
    for part in ("model", "clip-vit-tiny"):
        (directory / part).mkdir(parents=True)
        for file in (FIXTURE / part).iterdir():
            shutil.copyfile(file, directory / part / file.name)
    return directory / "model"


def change_json(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")


def attempt(call: Callable[[], Any]) -> tuple[Any, str | None]:
    """(result, None), or (None, text of the error that was meant for the user); other exceptions pass."""
    try:
        return call(), None
    except ParrotError as error:
        return None, str(error)
