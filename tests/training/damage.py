"""Ways to change the files of a training checkpoint that somebody else could have written."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from parrot_sys.megatron.checkpoint.checksums import digest_file
from parrot_sys.models.checkpoint_files import CHECKSUMS


class Hostile:
    """An object whose unpickling creates a directory."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


def sign(folder: Path) -> None:
    """Writes checksums that are right for what the folder holds now."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    digests = {name: digest_file(folder / name) for name in names if name != CHECKSUMS}
    (folder / CHECKSUMS).write_text(json.dumps(digests))


def saved(value: Any) -> bytes:
    """What `torch.save` writes of a value."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def poison(folder: Path, place: str, mark: Path) -> None:
    """Puts a hostile pickle into a checkpoint and signs it: `index`, `index attribute`, `common` or `objects`."""
    index = folder / ".metadata"
    if place == "index":
        index.write_bytes(pickle.dumps(Hostile(mark)))
    elif place == "common":
        # (Beside objects in the shards, later versions of Megatron still take what is in this file.)
        (folder / "common.pt").write_bytes(saved({"common": Hostile(mark)}))
    else:
        content = pickle.loads(index.read_bytes())
        if place == "index attribute":
            content.planner_data = Hostile(mark)
        for key, where in content.storage_data.items():
            if place == "objects" and key.fqn.startswith("random_state"):
                file = folder / where.relative_path
                where.offset, payload = file.stat().st_size, saved([Hostile(mark)])
                where.length = len(payload)
                with file.open("ab") as out:
                    out.write(payload)
        index.write_bytes(pickle.dumps(content))
    sign(folder)


def files_of(folder: Path) -> list[str]:
    """Paths of all files inside a checkpoint."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@contextlib.contextmanager
def damaged(path: Path, how: str, place: int) -> Iterator[None]:
    """A file without itself (`missing`), its end (`cut`) or one bit (`flipped`), in the block only.

    Args:
        path: the file.
        how: what happens to it; `empty` stands for a list of checksums without any.
        place: bit, or length that is kept; taken modulo what there is.
    """
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"{}")
    elif how == "cut":
        path.write_bytes(content[: place % len(content)])
    else:
        flipped = bytearray(content)
        flipped[place // 8 % len(content)] ^= 1 << place % 8
        path.write_bytes(flipped)
    try:
        yield
    finally:
        path.write_bytes(content)
