"""Large tensors of a training checkpoint, copied into their place some rows at a time."""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

from parrot_sys.errors import CheckpointError

PIECE_BYTES = 2**20
"""Bytes of a checkpoint that are in memory at once."""
_STORAGES = {
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
}
_LOCAL_HEADER = 30  # bytes before the name of an entry in a zip file; the lengths of name and extra field end it


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Place of a tensor without gaps, in a file that `torch.save` wrote."""

    dtype: torch.dtype
    size: tuple[int, ...]
    position: int
    """Of its first byte in the file."""

    def copy_into(self, target: Tensor, file: IO[bytes], offsets: list[int], lengths: list[int]) -> None:
        """Copies a part of it, converted on the way.

        Args:
            target: to be filled.
            file: that `position` belongs to.
            offsets: of the part, in each dimension.
            lengths: of the part.

        Raises:
            CheckpointError: the file ends before it.
            ValueError: the part has another shape than `target`.
        """
        if tuple(target.shape) != tuple(lengths):
            raise ValueError(f"a tensor of shape {tuple(lengths)} is stored, {tuple(target.shape)} is wanted")
        position, size = self.position, self.size
        while len(size) > 1 and lengths[0] == 1:  # the next dimension is the one to cut
            position += offsets[0] * math.prod(size[1:]) * self.dtype.itemsize
            target, size, offsets, lengths = target[0], size[1:], offsets[1:], lengths[1:]
        values = math.prod(size[1:])
        step = max(1, PIECE_BYTES // max(1, values * self.dtype.itemsize))
        for start in range(0, lengths[0], step):
            rows = min(step, lengths[0] - start)
            piece = torch.empty((rows, *size[1:]), dtype=self.dtype)
            file.seek(position + (offsets[0] + start) * values * self.dtype.itemsize)
            memory = piece.view(-1).view(torch.uint8).numpy().data
            if file.readinto(memory) != piece.nbytes:  # type: ignore[attr-defined]  # a buffered reader
                raise CheckpointError(f"{file.name} is damaged: it ends within a tensor; take another checkpoint")
            for dim, (at, length) in enumerate(zip(offsets[1:], lengths[1:], strict=True), 1):
                piece = piece.narrow(dim, at, length)
            target[start : start + rows].copy_(piece)


def find_tensor(file: IO[bytes], start: int, length: int) -> StoredTensor | None:
    """The tensor that `torch.save` wrote into a part of a file.

    Args:
        file: open for reading.
        start: first byte of the part.
        length: bytes of the part.

    Returns:
        None where the part holds anything else than one dense tensor of floating-point numbers, or is damaged: it is
        for `torch.load` to read it, and to say what is wrong with it.
    """
    view = _Part(file, start, length)
    try:
        with zipfile.ZipFile(view) as archive:
            entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            storages = [name for name in entries if name.startswith("data/")]
            data = entries["data/0"]
            if len(storages) != 1 or data.compress_type != zipfile.ZIP_STORED:
                return None
            if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
                return None
            with archive.open(entries["data.pkl"]) as pickled:
                found = _TensorUnpickler(pickled).load()
        view.seek(data.header_offset)
        header = view.read(_LOCAL_HEADER)
    except Exception:  # damaged files raise anything
        return None
    if not isinstance(found, _Described) or not found.is_dense or found.end > data.file_size:
        return None
    names = int.from_bytes(header[-4:-2], "little") + int.from_bytes(header[-2:], "little")
    first = start + data.header_offset + _LOCAL_HEADER + names
    return StoredTensor(found.dtype, found.size, first + found.offset * found.dtype.itemsize)


@dataclass(frozen=True, slots=True)
class _Described:
    """Description that a pickled tensor gives of itself."""

    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def rebuild(cls, dtype: torch.dtype, offset: int, size: Any, stride: Any, *_: Any) -> _Described:
        """Stands for `torch._utils._rebuild_tensor_v2`."""
        return cls(dtype, offset, tuple(size), tuple(stride))

    @property
    def is_dense(self) -> bool:
        """Whether its values lie in their order."""
        return len(self.size) > 0 and self.stride == torch.empty(self.size, device="meta").stride()

    @property
    def end(self) -> int:
        """Bytes of the storage up to its last value."""
        return (self.offset + math.prod(self.size)) * self.dtype.itemsize


class _Part(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        if self._at < 0:
            raise OSError("a place before the start")
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        data = self._file.read(max(0, min(len(buffer), self._length - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class _TensorUnpickler(pickle.Unpickler):
    """Describes the tensor, and makes nothing that the file names."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Described.rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> torch.dtype:
        _, dtype, *_ = pid
        return dtype  # type: ignore[no-any-return]  # from `find_class`, or `_Described` fails
