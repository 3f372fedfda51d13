"""Columns of an index: one numpy array a file, with a checksum, memory-mapped; texts in two arrays."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Columns = dict[str, Array]


class Texts(Sequence[str]):
    """Texts in one array of bytes."""

    def __init__(self, ends: Array, data: Array) -> None:
        """
        Args:
            ends: int64 [n], byte after the last of each text.
            data: uint8, all texts in UTF-8.
        """
        self.ends, self.data = ends, data

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        """Packs texts; halves of surrogate pairs are kept."""
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        ends = np.cumsum([len(each) for each in encoded], dtype=np.int64)
        return cls(ends, np.frombuffer(b"".join(encoded), dtype=np.uint8))

    @classmethod
    def joined(cls, parts: Sequence[Texts]) -> Texts:
        """Texts of all parts, one part after the other."""
        starts = np.cumsum([0, *(len(part.data) for part in parts)])
        return cls(
            concatenate([part.ends + start for part, start in zip(parts, starts[:-1].tolist(), strict=True)], np.int64),
            concatenate([part.data for part in parts], np.uint8),
        )

    def chosen(self, numbers: Array) -> Texts:
        """The texts of these numbers, in their order."""
        starts = np.concatenate([[0], self.ends[:-1]]) if len(self.ends) else self.ends
        sizes = (self.ends - starts)[numbers]
        ends = np.cumsum(sizes, dtype=np.int64)
        bytes_at = np.repeat(starts[numbers] - (ends - sizes), sizes) + np.arange(int(sizes.sum()))
        return Texts(ends, self.data[bytes_at])

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: Any) -> Any:
        start = int(self.ends[number - 1]) if number else 0
        return self.data[start : int(self.ends[number])].tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return (self[number] for number in range(len(self)))


def concatenate(arrays: Sequence[Array], dtype: npt.DTypeLike) -> Array:
    """The arrays one after the other; an empty one where there are none."""
    return np.concatenate([np.asarray(array, dtype=dtype) for array in arrays]) if arrays else np.empty(0, dtype)


def write_part(path: Path, columns: Mapping[str, Array]) -> None:
    """Writes the columns of some records, all of them or none."""
    temporary = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            arrays: Any = columns
            np.savez(file, **arrays)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_part(path: Path) -> Columns | None:
    """Columns that `write_part` wrote (a zip file, so with checksums); None without a whole one."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def write_columns(folder: Path, columns: Mapping[str, Array]) -> dict[str, int]:
    """Writes a file for each column; their checksums."""
    for name, values in columns.items():
        np.save(folder / f"{name}.npy", np.ascontiguousarray(values))
    return {name: checksum(np.ascontiguousarray(values)) for name, values in columns.items()}


def map_columns(folder: Path, checksums: Mapping[str, int]) -> Columns:
    """Maps the files of columns into memory: processes share what is read of them.

    Raises:
        ValueError, OSError: a file is missing or not what was written; names it.
    """
    columns = {}
    for name, wanted in checksums.items():
        path = folder / f"{name}.npy"
        try:
            # (An empty array has nothing to map.)
            values = np.load(path, mmap_mode="r", allow_pickle=False) if path.stat().st_size > 256 else np.load(path)
        except OSError:
            raise
        except Exception as error:  # (of a damaged header, numpy raises what its parser happens to raise)
            raise ValueError(f"{path.name} is damaged ({error})") from error
        columns[name] = np.asarray(values)
        if checksum(columns[name]) != wanted:
            raise ValueError(f"{path.name} is damaged (checksum)")
    return columns


def checksum(values: Array) -> int:
    """Of an array's content, type and shape."""
    return zlib.crc32(values.reshape(-1).view(np.uint8).data, zlib.crc32(f"{values.dtype} {values.shape}".encode()))
