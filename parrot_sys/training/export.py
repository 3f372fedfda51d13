"""Which step of a run an exported model is."""

from __future__ import annotations

import json
from pathlib import Path

from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.errors import CheckpointError
from parrot_sys.files import Fields, read_json

_FILE = "training.json"


def save_with_step(processor: ParrotProcessor, step: int, folder: Path) -> None:
    """Writes the files of an exported model that are no weights: those of the processor, and the steps done."""
    processor.save_pretrained(folder)
    (folder / _FILE).write_text(json.dumps({"step": step}) + "\n", encoding="utf-8")


def exported_step(folder: Path) -> int | None:
    """Steps that were done when `folder` was exported; None where there is no model, or it does not say."""
    try:
        return Fields(read_json(folder / _FILE), folder / _FILE).get("step", int)
    except CheckpointError:
        return None
