"""Small tables for the evaluation tests."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image


def picture(color: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (12, 9)) -> str:
    """A PNG in base64."""
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as a TSV; a missing key becomes an empty cell; `image` defaults to a red picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame([{"image": picture(), **row} for row in rows]).to_csv(path, sep="\t", index=False)
    return path
