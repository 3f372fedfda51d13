"""FeatureStore: outputs of a frozen vision tower on disk, computed once for each image and tower.

Keys are hashes of the image files' contents, so that moved or copied images are found again. Every write is one new
file that appears under its final name only when complete: several processes can write at once, and a killed one loses
nothing but the write it was in. Each image's features carry a checksum that is compared whenever they are read; a
damaged file is set aside (`.damaged`), and its images are computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import uuid
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from parrot_sys.data.decoding import image_digest
from parrot_sys.data.image_files import ImageFile
from parrot_sys.errors import DataError, StorageError

logger = logging.getLogger(__name__)
_SHARDS = "*.npy"


class DamagedFeaturesError(StorageError):
    """Stored features are not what was written."""


def tower_fingerprint(weights: Mapping[str, Tensor], *settings: object) -> str:
    """Hash of everything that decides the tower's output.

    Args:
        weights: state dict of the tower.
        settings: configuration of the tower and the `ImageProcessor`; anything whose `repr` tells its value.
    """
    digest = hashlib.sha256(repr(settings).encode())
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tile_keys(keys: Iterable[str], tiles: Iterable[int]) -> list[str]:
    """Keys of the tiles of pictures with these keys; the first tile has the picture's own."""
    return [
        hashlib.sha256(f"{key} {tile}".encode()).hexdigest() if tile else key
        for key, count in zip(keys, tiles, strict=True)
        for tile in range(count)
    ]


class FeatureStore:
    """Memory-mapped features of one tower, shared by processes. V visual rows, C features."""

    def __init__(self, directory: str | Path, tower: str) -> None:
        """Opens or creates the store.

        Args:
            directory: shared by all towers.
            tower: `tower_fingerprint` of the tower whose features these are.
        """
        self.directory = Path(directory) / tower[:32]
        self.directory.mkdir(parents=True, exist_ok=True)
        self._places: dict[str, tuple[Path, int]] = {}
        self._shards: dict[Path, np.memmap] = {}
        self._keys: dict[str, str] = {}
        self.failures: dict[str, str] = {}
        """File or key of each image that has no features -> why; the same on every rank that filled the store."""
        self.refresh()

    def __len__(self) -> int:
        """Images whose features this process knows to be stored."""
        return len(self._places)

    def keys(self, images: Iterable[ImageFile]) -> list[str]:
        """Key of each image file. A file is read once; files must not change while the store is open.

        Raises:
            DataError: a file is missing or cannot be read.
        """
        return [self._key(image) for image in images]

    def _key(self, image: ImageFile) -> str:
        if (name := str(image)) not in self._keys:
            self._keys[name] = image_digest(image)
        return self._keys[name]

    def missing(self, images: Iterable[ImageFile], *, skip_unreadable: bool = False) -> list[str]:
        """Names (`str`) of files whose features are not stored yet, one for each distinct content, in the order given.

        Ranks that share the work take `missing(images)[rank::world_size]` before any of them writes.

        Args:
            images: image files.
            skip_unreadable: note a file that cannot be read in `failures` instead of raising.

        Raises:
            DataError: a file is missing or cannot be read.
        """
        self.refresh()
        wanted: dict[str, str] = {}
        for image in images:
            name = str(image)
            try:
                key = self._key(image)
            except StorageError:
                raise
            except DataError as error:
                if not skip_unreadable:
                    raise
                self.failures[name] = str(error)
                continue
            if key not in self._places:
                wanted.setdefault(key, name)
        return list(wanted.values())

    def write(self, keys: Sequence[str], features: Tensor) -> None:
        """Stores features [n, V, C] under n keys, all of them or (when interrupted) none.

        Raises:
            DataError: the numbers differ, or the shape is not that of the features stored before.
        """
        values = features.detach().to("cpu", torch.float32).numpy()
        if values.ndim != 3 or len(values) != len(keys):
            raise DataError(f"features must be [{len(keys)}, V, C] for {len(keys)} keys, got {list(values.shape)}")
        self._check_shape(values.shape[1:])
        if not keys:
            return
        shard = np.empty(len(keys), dtype=_row_type(values.shape[1:]))
        shard["key"] = [key.encode() for key in keys]
        shard["features"] = values
        shard["checksum"] = [_checksum(key, own) for key, own in zip(keys, values, strict=True)]
        name = uuid.uuid4().hex
        temporary = self.directory / f"{name}.tmp"
        with temporary.open("wb") as file:
            np.save(file, shard)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.directory / f"{name}.npy")
        self.refresh()

    def get(self, keys: Sequence[str]) -> Tensor:
        """Features of n images, float32 [n, V, C]; n >= 1.

        Raises:
            DataError: features of a key are not stored.
        """
        if any(key not in self._places for key in keys):
            self.refresh()
        if absent := [key for key in keys if key not in self._places]:
            raise DataError(
                f"feature store {self.directory} holds no features of {len(absent)} of {len(keys)} images "
                f"(first key {absent[0]}); fill it with write() first"
            )
        return torch.from_numpy(np.stack([self._read(key) for key in keys]))

    def features_of(self, images: Sequence[ImageFile], tiles: Sequence[int] | None = None) -> Tensor:
        """Features of image files, float32 [n, V, C]; n >= 1.

        Args:
            images: image files.
            tiles: how many tiles each was cut into, n together; None: each is whole.

        Raises:
            DataError: an image has none, since it cannot be read: says why.
            DamagedFeaturesError: what is stored is not what was written.
        """
        for image in images:
            if (reason := self.failures.get(str(image))) is not None:
                raise DataError(reason)
        keys = self.keys(images)
        for key in keys:
            if (reason := self.failures.get(key)) is not None:
                raise DataError(reason)
        return self.get(keys if tiles is None else tile_keys(keys, tiles))

    def no_features(self) -> Tensor:
        """Features of no image, [0, V, C]; some must be stored."""
        shape = next(iter(self._shards.values()))["features"].shape[1:]
        return torch.empty(0, *shape)

    def refresh(self) -> None:
        """Takes in what other processes have written; a damaged file is set aside."""
        for path in sorted(self.directory.glob(_SHARDS)):
            if path in self._shards:
                continue
            try:
                shard = _map_shard(path)
                names = [key.decode() for key in shard["key"]]
            except FileNotFoundError:  # another process has set it aside
                continue
            except Exception as error:  # (of a damaged header, numpy raises what its parser happens to raise)
                logger.warning("feature store: %s is damaged (%s); its images are computed again", path, error)
                _set_aside(path)
                continue
            self._check_shape(shard["features"].shape[1:])
            self._shards[path] = shard
            self._places.update((name, (path, row)) for row, name in enumerate(names))

    def _read(self, key: str) -> np.ndarray:
        """[V, C] of one image, compared with its checksum."""
        path, row = self._places[key]
        stored = self._shards[path][row]
        values = np.array(stored["features"])
        if _checksum(key, values) != stored["checksum"]:
            _set_aside(path)
            raise DamagedFeaturesError(
                f"feature store: {path} is damaged (checksum of {key}); it is set aside: start again, and its images "
                "are computed again"
            )
        return values

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        for path, shard in self._shards.items():
            if (known := shard["features"].shape[1:]) != shape:
                raise DataError(
                    f"features must be [n, {known[0]}, {known[1]}] as in {path}, got [n, {shape[0]}, {shape[1]}]"
                )
            return


def _row_type(shape: tuple[int, ...]) -> np.dtype:
    return np.dtype([("key", "S64"), ("features", np.float32, shape), ("checksum", np.uint32)])


def _map_shard(path: Path) -> np.memmap:
    """A file of features whose header is what was written: its type of row, and as many rows as the file is long."""
    shard = np.load(path, mmap_mode="r", allow_pickle=False)
    if shard.ndim != 1 or shard.dtype != _row_type(shard["features"].shape[1:]):
        raise ValueError(f"rows of type {shard.dtype}")
    if shard.offset + shard.nbytes != path.stat().st_size:
        raise ValueError(f"{path.stat().st_size} bytes, not {shard.offset + shard.nbytes}")
    return shard


def _checksum(key: str, values: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(values).data, zlib.crc32(f"{key} {values.shape}".encode()))


def _set_aside(path: Path) -> None:
    """Renames a damaged file, so that nobody reads it again; another process may have been first."""
    with contextlib.suppress(OSError):
        path.replace(path.with_suffix(".damaged"))
