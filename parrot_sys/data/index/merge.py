"""Columns of blocks -> columns of the whole index."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from parrot_sys.data.index.block import text_columns, texts_of
from parrot_sys.data.index.columns import Array, Columns, Texts, concatenate
from parrot_sys.errors import StorageError

_PLAIN = {
    "places": np.int64,
    "tokens": np.int32,
    "markers": np.int32,
    "runs": np.int32,
    "flags": np.uint8,
    "turns": np.int32,
    "digests": np.uint64,
    "problem_numbers": np.int64,
}
_COPY = 1 << 22


def merge(blocks: Sequence[Columns], pictures: Sequence[Path], output: Path) -> Columns:
    """Joins blocks in their order.

    Args:
        blocks: from `Indexer.columns`.
        pictures: the file of each block's own pictures, which may not exist.
        output: file for the pictures of all blocks, each content once; made only if there are any.
    """
    merged = {name: concatenate([block[name] for block in blocks], dtype) for name, dtype in _PLAIN.items()}
    for name in ("places", "runs"):
        merged[name] = merged[name].reshape(-1, 2)
    for name in ("ids", "problems"):
        merged |= text_columns(name, Texts.joined([texts_of(block, name) for block in blocks]))
    for name in ("picture", "run"):
        counts = concatenate([block[f"{name}_counts"] for block in blocks], np.int64)
        merged[f"{name}_ends"] = np.cumsum(counts, dtype=np.int64)
    return merged | _merge_languages(blocks) | _merge_pictures(blocks, pictures, output)


def _merge_languages(blocks: Sequence[Columns]) -> Columns:
    known: dict[str, int] = {}
    spoken = []
    for block in blocks:
        numbers = [0, *(1 + known.setdefault(name, len(known)) for name in texts_of(block, "languages"))]
        spoken.append(np.array(numbers, dtype=np.int32)[block["spoken"]])
    return {"spoken": concatenate(spoken, np.int32), **text_columns("languages", Texts.of(known))}


def _merge_pictures(blocks: Sequence[Columns], files: Sequence[Path], output: Path) -> Columns:
    """One number for each name, in the order in which the names come first."""
    keys = concatenate([block["picture_keys"].reshape(-1, 2) for block in blocks], np.uint64).reshape(-1, 2)
    owners = np.repeat(np.arange(len(blocks)), [len(block["picture_keys"]) for block in blocks])
    starts = np.cumsum([0, *(len(block["picture_keys"]) for block in blocks)])
    first, numbers = _first_of_each(keys)
    used = [
        numbers[block["pictures"] + start].astype(np.int32)
        for block, start in zip(blocks, starts[:-1].tolist(), strict=True)
    ]
    places = concatenate([block["picture_places"].reshape(-1, 2) for block in blocks], np.int64).reshape(-1, 2)[first]
    _copy_pictures(places, owners[first], files, output)
    names = Texts.joined([texts_of(block, "picture_names") for block in blocks]).chosen(first)
    return {"pictures": concatenate(used, np.int32), "picture_places": places, **text_columns("picture_names", names)}


def _first_of_each(keys: Array) -> tuple[Array, Array]:
    """Where each distinct key comes first, ascending; the number among those of every key."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: the first of equal ones comes first
    ordered = keys[order]
    begins = np.ones(len(keys), dtype=bool)
    begins[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = order[begins]
    by_place = np.argsort(first, kind="stable")
    rank = np.empty(len(first), dtype=np.int64)
    rank[by_place] = np.arange(len(first))
    numbers = np.empty(len(keys), dtype=np.int64)
    numbers[order] = rank[np.cumsum(begins) - 1] if len(keys) else 0
    return first[by_place], numbers


def _copy_pictures(places: Array, owners: Array, files: Sequence[Path], output: Path) -> None:
    """Moves the pictures that records hold themselves to one file, and sets `places` to where they are there."""
    wanted = np.flatnonzero(places[:, 0] >= 0).tolist()
    if not wanted:
        return
    at = 0
    with output.open("wb") as target:
        for number in wanted:
            start, size = places[number].tolist()
            with files[int(owners[number])].open("rb") as source:
                source.seek(start)
                left = size
                while left and (chunk := source.read(min(left, _COPY))):
                    target.write(chunk)
                    left -= len(chunk)
            if left:
                raise StorageError(f"{files[int(owners[number])]} ends too early: remove the folder and build it again")
            places[number] = at, size
            at += size
        target.flush()
        os.fsync(target.fileno())
