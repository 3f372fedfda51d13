"""Identities of a run at its trackers, kept in OUTPUT/trackers.json: a run that goes on is the same one there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from parrot_sys.errors import ConfigError
from parrot_sys.files import read_json, replace_text

IDENTITY_FILE = "trackers.json"


def run_identity(output: Path, tracker: str, create: Callable[[], str]) -> str:
    """The identity of the run in `output` at `tracker`; a new one is written down.

    Raises:
        ConfigError: the file is damaged.
    """
    file = output / IDENTITY_FILE
    known = read_json(file, ConfigError) if file.exists() else {}
    if not isinstance(known.get(tracker), str):
        known[tracker] = create()
        replace_text(file, json.dumps(known, indent=2) + "\n")
    identity: str = known[tracker]
    return identity
