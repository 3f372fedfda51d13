"""Reading of training checkpoints as data: whatever a file holds, nothing in it is executed.

PyTorch unpickles `.metadata` and objects inside the shards without limits, some versions of Megatron also `common.pt`.
Here an index may hold the classes of an index only, and all else what `torch.load(weights_only=True)` takes.
"""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from parrot_sys.errors import CheckpointError
from parrot_sys.megatron.checkpoint.pieces import PIECE_BYTES, find_tensor
from parrot_sys.megatron.runtime.compat import replaced_readers
from parrot_sys.models.checkpoint_files import COMMON, INDEX, check_whole

_CHECKPOINT = "torch.distributed.checkpoint"
_CLASSES = {
    f"{_CHECKPOINT}.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    f"{_CHECKPOINT}.planner": {"BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    f"{_CHECKPOINT}.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
}
"""Module -> names that an index may hold, besides the types of tensors."""


def load_sharded(state: dict[str, Any], folder: str | Path) -> dict[str, Any]:
    """Fills a sharded state dict from a checkpoint; a collective. Data-parallel ranks share the reading.

    Raises:
        CheckpointError: a file cannot be read, or holds more than data.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    strategy = FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), group)
    with as_data(folder):
        return dict(dist_checkpointing.load(state, str(folder), sharded_strategy=strategy))


def load_common(folder: str | Path) -> dict[str, Any]:
    """Contents of a checkpoint besides tensors and objects of single ranks.

    Raises:
        CheckpointError: as `load_sharded`.
    """
    with as_data(folder):
        return dict(dist_checkpointing.load_common_state_dict(str(folder)))


def tensors_of(folder: str | Path) -> dict[str, Any]:
    """Name -> tensor without data, of all tensors in a checkpoint.

    Raises:
        CheckpointError: as `load_sharded`.
    """
    with as_data(folder):
        return dict(dist_checkpointing.load_tensors_metadata(str(folder)))


@contextlib.contextmanager
def as_data(folder: str | Path) -> Iterator[None]:
    """Megatron reads with what is below; what goes wrong names the checkpoint."""
    check_whole(folder)
    try:
        with replaced_readers(DataReader, _read_common):
            yield
    except CheckpointError:
        raise
    except CheckpointException as error:  # torch's, no Exception; its text is a page with tracebacks of all ranks
        rank, (reason, _) = min(error.failures.items())
        if isinstance(reason, CheckpointError):
            raise reason from error
        raise CheckpointError(f"{folder} cannot be loaded: rank {rank}: {type(reason).__name__}: {reason}") from error
    except (CheckpointingException, ValueError, TypeError, LookupError, AttributeError, OSError) as error:
        raise CheckpointError(f"{folder} cannot be loaded: {type(error).__name__}: {error}") from error


class DataReader(FileSystemReader):
    """PyTorch's reader, which reads the index once and takes only data."""

    def __init__(self, path: Any, *_: Any, **__: Any) -> None:
        super().__init__(path)
        self._index: Metadata | None = None

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """
        Raises:
            CheckpointError: the index is missing, damaged, or holds more than an index does.
        """
        if self._index is None:
            self._index = _read_index(Path(self.path) / INDEX)
            self._index.storage_meta = None  # says where it was written
        return self._index

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Any:
        """Gives the planner what the plan asks for; of large tensors, little is in memory beside their target."""
        rest = [item for item in plan.items if not self._read_in_pieces(item, planner)]
        plain = _PlainObjects(planner, Path(self.path))
        return super().read_data(replace(plan, items=rest), plain)  # type: ignore[arg-type]  # answers alike

    def _read_in_pieces(self, item: ReadItem, planner: LoadPlanner) -> bool:
        """Whether this was a large tensor that could be read so."""
        place = self.storage_data[item.storage_index]
        if item.type is not LoadItemType.TENSOR or place.length <= PIECE_BYTES or place.transform_descriptors:
            return False
        with (Path(self.path) / place.relative_path).open("rb") as file:
            stored = find_tensor(file, place.offset, place.length)
            if stored is None:
                return False
            target = planner.resolve_tensor(item).detach()
            stored.copy_into(target, file, list(item.storage_offsets), list(item.lengths))
        planner.commit_tensor(item, target)
        return True


class _PlainObjects:
    """A planner that gets objects in a pickle made here, since it unpickles them without limits."""

    def __init__(self, planner: LoadPlanner, folder: Path) -> None:
        self._planner, self._folder = planner, folder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._planner, name)

    def load_bytes(self, item: ReadItem, value: io.BytesIO) -> None:
        plain = _load(value, f"{item.storage_index.fqn} in {self._folder}")
        copy = io.BytesIO()
        torch.save(plain, copy)
        copy.seek(0)
        self._planner.load_bytes(item, copy)


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if name not in _CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _read_index(path: Path) -> Metadata:
    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file).load()
        if not isinstance(index, Metadata):
            raise TypeError(f"it holds a {type(index).__name__}")
        for place in (index.storage_data or {}).values():
            if not (name := place.relative_path) or name != Path(name).name:
                raise ValueError(f"it names {name!r}, which is no file beside it")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; take another checkpoint") from error
    except Exception as error:  # damaged pickles raise anything
        raise CheckpointError(
            f"{path} is no index of a checkpoint, so it is not loaded ({type(error).__name__}: {error}); take another "
            "checkpoint, or copy this one again from its source"
        ) from error
    return index


def _read_common(folder: str | Path) -> dict[str, Any]:
    return dict(_load(Path(folder) / COMMON, str(Path(folder) / COMMON)))


def _load(source: Path | IO[bytes], name: str) -> Any:
    """Contents of a file of `torch.save`, when these are tensors and plain values."""
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error.strerror}; take another checkpoint") from error
    except Exception as error:  # damaged files raise anything
        first = next(iter(str(error).splitlines()), "")  # (Torch's own words advise to load it all the same.)
        raise CheckpointError(
            f"{name} is damaged, or holds more than tensors and plain values, so it is not loaded "
            f"({type(error).__name__}: {_named_global(str(error)) or first}); take another checkpoint"
        ) from error


def _named_global(text: str) -> str | None:
    """The class that torch's message names."""
    _, found, rest = text.partition("GLOBAL ")
    return f"it names {rest.split()[0]}" if found and rest.split() else None
