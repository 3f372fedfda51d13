"""Tensors of a Hugging Face checkpoint directory, read one at a time and written shard by shard."""

from __future__ import annotations

import json
import pickle
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from parrot_sys.errors import CheckpointError

MAX_SHARD_BYTES = 5 * 10**9
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


class TensorFiles:
    """Read-only view of `model.safetensors` or `pytorch_model.bin` in a directory, sharded (index.json) or single.

    A context manager. Tensors are read when asked for (files are memory-mapped), so a model can be filled without
    holding a second copy of the checkpoint.

    Raises:
        CheckpointError: no weights, a shard is missing or damaged, or the index names a tensor that its file lacks.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        """Open file, or for .bin the memory-mapped dictionary of its tensors, by file name."""
        self._file_of = self._find()
        for name in sorted(set(self._file_of.values())):
            self._files[name] = self._open(directory / name)
        if lost := [key for key, name in self._file_of.items() if key not in set(self._files[name].keys())]:
            raise CheckpointError(f"{directory}: the index names tensors that their files lack: {sorted(lost)}")

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._files.clear()

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._file_of)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        file = self._files[self._file_of[key]]
        return tuple(file[key].shape) if isinstance(file, dict) else tuple(file.get_slice(key).get_shape())

    def dtype(self, key: str) -> torch.dtype:
        """
        Raises:
            CheckpointError: the tensor is stored in a quantised format that is not supported.
        """
        file = self._files[self._file_of[key]]
        if isinstance(file, dict):
            return file[key].dtype
        name = file.get_slice(key).get_dtype()
        if name not in _DTYPES:
            raise CheckpointError(f"{self.directory}: {key} is stored as {name}; wanted one of {', '.join(_DTYPES)}")
        return _DTYPES[name]

    def tensor(self, key: str) -> Tensor:
        """The tensor on the CPU in the file's dtype."""
        file = self._files[self._file_of[key]]
        return file[key] if isinstance(file, dict) else file.get_tensor(key)

    def _find(self) -> dict[str, str]:
        for name in (_SAFETENSORS, _BIN):
            index = self.directory / (name + _INDEX)
            if index.is_file():
                try:
                    return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
                except (ValueError, KeyError, TypeError) as error:
                    raise CheckpointError(f"{index} is damaged: {error!r}") from error
            path = self.directory / name
            if path.is_file():
                self._files[name] = self._open(path)
                return dict.fromkeys(self._files[name].keys(), name)
        raise CheckpointError(
            f"{self.directory} holds no weights; wanted {_SAFETENSORS} or {_BIN}, or {_SAFETENSORS}{_INDEX} with its "
            "shards"
        )

    def _open(self, path: Path) -> Any:
        if path.name in self._files:
            return self._files[path.name]
        try:
            if path.suffix == ".bin":
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return self._stack.enter_context(safe_open(path, framework="pt"))
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing; the index names it as a shard") from None
        except (SafetensorError, RuntimeError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error


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
    path = path.absolute()
    check_absent(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        if path.is_dir():
            old = temporary.with_suffix(".old")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_tensors(
    tensors: Iterable[tuple[str, Tensor]], directory: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write (key, tensor) pairs as model.safetensors, or as shards with an index when they exceed `max_shard_bytes`."""
    shards: list[tuple[Path, list[str]]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        path = directory / f"shard-{len(shards)}.tmp"
        save_file(pending, path, metadata={"format": "pt"})
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
