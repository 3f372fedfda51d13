"""Tensors of a Hugging Face checkpoint directory, read one at a time and written shard by shard."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from parrot_sys.errors import CheckpointError
from parrot_sys.files import Fields, errors_named, read_json, save_tensors
from parrot_sys.staging import staged_directory

MAX_SHARD_BYTES = 5 * 10**9
_MAPPED_BYTES = 16 * 2**20
"""Bytes read after which files are mapped anew: what was read from a mapping stays resident as long as that does."""
_INDEX = ".index.json"
_SAFETENSORS, _BIN = "model.safetensors", "pytorch_model.bin"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}  # names in safetensors headers
_DAMAGED = "is damaged"


class TensorFiles:
    """Read-only view of `model.safetensors` or `pytorch_model.bin` in a directory, sharded (index.json) or single.

    A context manager. Files are memory-mapped, and a tensor is read when it is asked for, so a model can be filled
    without a second copy of the checkpoint in memory.

    Raises:
        CheckpointError: no weights, a shard is missing or damaged, or the index names a tensor that its file lacks.
    """

    def __init__(self, directory: Path, usual_name: Callable[[str], str] | None = None) -> None:
        """
        Args:
            directory: of the checkpoint.
            usual_name: name in the files -> the one that a tensor is asked for by; None: the same.
        """
        self.directory = directory
        self._files: dict[str, _File] = {}
        self._touched: set[str] = set()
        self._read = 0
        try:
            file_of = self._find()
            self._stored = {usual_name(key) if usual_name is not None else key: key for key in file_of}
            self._file_of = {key: file_of[stored] for key, stored in self._stored.items()}
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._file_of)

    def stored_name(self, key: str) -> str:
        """Name of a tensor in the files; the usual one of a tensor that they lack."""
        return self._stored.get(key, key)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return self._file(key).shape(self._stored[key])

    def dtype(self, key: str) -> torch.dtype:
        """
        Raises:
            CheckpointError: the tensor is stored in a quantised format that is not supported.
        """
        return self._file(key).dtype(self._stored[key])

    def tensor(self, key: str) -> Tensor:
        """The tensor on the CPU in the file's dtype: a view of the mapped file, to be copied and let go."""
        if self._read > _MAPPED_BYTES:
            for name in self._touched:
                self._files[name].renew()
            self._read = 0
            self._touched.clear()
        tensor = self._file(key).tensor(self._stored[key])
        self._read += tensor.nbytes
        self._touched.add(self._file_of[key])
        return tensor

    def _file(self, key: str) -> _File:
        return self._files[self._file_of[key]]

    def _close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _find(self) -> dict[str, str]:
        for name in (_SAFETENSORS, _BIN):
            index = self.directory / (name + _INDEX)
            if index.is_file():
                return self._open_shards(index)
            path = self.directory / name
            if path.is_file():
                self._files[name] = _open(path)
                return dict.fromkeys(self._files[name].names(), name)
        raise CheckpointError(
            f"{self.directory} holds no weights; wanted {_SAFETENSORS} or {_BIN}, or {_SAFETENSORS}{_INDEX} with its "
            "shards"
        )

    def _open_shards(self, index: Path) -> dict[str, str]:
        shards = Fields(read_json(index), index).below("weight_map")
        file_of = {key: shards.require(key, str) for key in shards.values}
        if not file_of:
            raise CheckpointError(f"{index} {_DAMAGED}: weight_map must name a file for each tensor, got none")
        for name in sorted(set(file_of.values())):
            if Path(name).name != name:
                raise CheckpointError(f"{index} {_DAMAGED}: shards must lie beside it, got the file name {name!r}")
            if not os.path.isfile(self.directory / name):  # (Path.is_file raises for names that no file can have)
                raise CheckpointError(f"{self.directory / name} is missing; the index names it as a shard")
            self._files[name] = _open(self.directory / name)
        held = {name: set(file.names()) for name, file in self._files.items()}
        if lost := sorted(key for key, name in file_of.items() if key not in held[name]):
            raise CheckpointError(f"{self.directory}: the index names tensors that their files lack: {lost}")
        return file_of


class _File(Protocol):
    """One open file with tensors."""

    def names(self) -> list[str]: ...
    def shape(self, key: str) -> tuple[int, ...]: ...
    def dtype(self, key: str) -> torch.dtype: ...
    def tensor(self, key: str) -> Tensor: ...
    def renew(self) -> None: ...
    def close(self) -> None: ...


def _open(path: Path) -> _File:
    return _PickleFile(path) if path.suffix == ".bin" else _SafetensorsFile(path)


class _SafetensorsFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._map()

    def _map(self) -> None:
        with errors_named(self._path, what=_DAMAGED):
            self._file: Any = safe_open(self._path, framework="pt").__enter__()

    def names(self) -> list[str]:
        return list(self._file.keys())

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(key).get_shape())

    def dtype(self, key: str) -> torch.dtype:
        name = self._file.get_slice(key).get_dtype()
        if name not in _DTYPES:
            raise CheckpointError(f"{self._path}: {key} is stored as {name}; wanted one of {', '.join(_DTYPES)}")
        return _DTYPES[name]

    def tensor(self, key: str) -> Tensor:
        self.dtype(key)  # is one that torch has
        with errors_named(self._path, what=_DAMAGED):
            tensor: Tensor = self._file.get_tensor(key)
        return tensor

    def renew(self) -> None:
        self.close()
        self._map()

    def close(self) -> None:
        self._file.__exit__(None, None, None)


class _PickleFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._tensors = self._map()

    def _map(self) -> dict[str, Tensor]:
        tensors = load_pickle(self._path)
        for key, value in tensors.items():
            if not isinstance(value, Tensor):
                raise CheckpointError(
                    f"{self._path}: {key} must be a tensor, got {type(value).__name__}; a checkpoint holds a flat "
                    "dictionary of tensors"
                )
            if value.layout != torch.strided or value.dtype not in _DTYPES.values() or value.device.type != "cpu":
                raise CheckpointError(
                    f"{self._path}: {key} must be a dense tensor of {', '.join(map(str, _DTYPES.values()))}, got "
                    f"{value.dtype}, {value.layout}, on {value.device}"
                )
        return tensors

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].dtype

    def tensor(self, key: str) -> Tensor:
        return self._tensors[key]

    def renew(self) -> None:
        if zipfile.is_zipfile(self._path):  # an older one is not mapped
            self._tensors = {}
            self._tensors = self._map()

    def close(self) -> None:
        self._tensors = {}


def load_pickle(path: Path) -> dict[str, Any]:
    """The dictionary in a file that `torch.save` wrote, memory-mapped, without running any code that it holds.

    Raises:
        CheckpointError: the file is missing, damaged, or holds other things than tensors and plain values.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; wanted a file that torch.save wrote")
    try:
        with errors_named(path, what=f"{_DAMAGED}, or no file that torch.save wrote"):
            # (Before torch 1.6 files were no zip archives; such a one is read as a whole.)
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except CheckpointError as error:
        if not isinstance(error.__cause__, pickle.UnpicklingError):
            raise
        # (Torch's own words advise to load it all the same.)
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"objects of {named[1]}" if named else "no tensors and plain values, or more than these"
        raise CheckpointError(
            f"{path} holds {what}, which are not loaded because they can run any code: where you trust the file, load "
            "it, turn settings into a plain dict, and torch.save it again"
        ) from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        got = "other keys" if isinstance(values, dict) else type(values).__name__
        raise CheckpointError(f"{path} must hold a dictionary with text as keys, got {got}")
    return values


_MARKS_OF_CHECKPOINTS = ("config.json", "model_config.yaml")


def check_absent(path: Path, *, overwrite: bool) -> None:
    """
    Raises:
        CheckpointError: `path` exists and may not be overwritten, or is something else than a checkpoint.
    """
    if not path.exists():
        return
    if not overwrite:
        raise CheckpointError(f"{path} exists already; choose another directory, or allow overwriting (--force)")
    empty = path.is_dir() and not any(path.iterdir())
    if not empty and not any((path / name).is_file() for name in _MARKS_OF_CHECKPOINTS):
        raise CheckpointError(
            f"{path} is no checkpoint (it holds none of {', '.join(_MARKS_OF_CHECKPOINTS)}), so it is not replaced; "
            "choose another directory, or remove it yourself"
        )


@contextmanager
def new_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A directory that appears at `path` only when the block has ended well; until then it has another name beside it.

    Raises:
        CheckpointError: `path` exists already and `overwrite` is not set.
    """
    check_absent(path, overwrite=overwrite)
    with staged_directory(path) as folder:
        yield folder


def write_tensors(
    tensors: Iterable[tuple[str, Tensor]], directory: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write (key, tensor) pairs as model.safetensors, or as shards with an index when they exceed `max_shard_bytes`."""
    shards: list[tuple[Path, list[str]]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        path = directory / f"shard-{len(shards)}.tmp"
        save_tensors(pending, path)
        shards.append((path, list(pending)))
        pending.clear()

    for key, tensor in tensors:
        if pending and size + tensor.nbytes > max_shard_bytes:
            flush()
            size = 0
        pending[key] = tensor.detach().to("cpu", copy=True).contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        shards[0][0].rename(directory / _SAFETENSORS)
        return
    weight_map: dict[str, str] = {}
    for number, (path, keys) in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path.rename(directory / name)
        weight_map |= dict.fromkeys(keys, name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / (_SAFETENSORS + _INDEX)).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
