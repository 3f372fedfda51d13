"""ImageRoot: the pictures of one data set, wherever its image root and its records have them."""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from parrot_sys.data.image_files import ImageFile
from parrot_sys.data.image_sources.archive import Archive, ArchiveSet
from parrot_sys.data.image_sources.base import ImageSource, inner_name
from parrot_sys.data.image_sources.data_urls import PREFIX, DataUrls
from parrot_sys.data.image_sources.folder import REMEDY, ImageFolder
from parrot_sys.data.image_sources.parquet import ParquetArchive
from parrot_sys.data.image_sources.remote_folder import RemoteFolder
from parrot_sys.data.image_sources.tar import TarArchive
from parrot_sys.data.remote.config import RemoteConfig
from parrot_sys.data.remote.file import LocalFile, RemoteFile
from parrot_sys.data.remote.storage import RemoteStorage, is_remote
from parrot_sys.errors import DataError, ParrotError, StorageError, printable

logger = logging.getLogger(__name__)

ARCHIVES: tuple[type[Archive], ...] = (TarArchive, ParquetArchive)
"""Kinds of archives; each knows how the names of its files end."""


class ImageRoot:
    """Pictures by the names that records give them.

    The root is a folder, an archive, or a pattern of archives (`shards/*.tar`), here or remote (`s3://...`). A name
    that is no file of a folder is looked for in the archives that lie in it. Data URLs need no root.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        allow_outside: bool = False,
        remedy: str = REMEDY,
        cache_dir: str | Path | None = None,
        remote: RemoteConfig | None = None,
        own: Sequence[ImageSource] = (),
    ) -> None:
        """
        Args:
            root: see above.
            allow_outside: also take files whose names lead out of a folder.
            remedy: what to do about a name that leads out of it, for messages.
            cache_dir: where indexes of archives go that cannot be kept beside them, and what was read of remote files.
            remote: how remote files are read.
            own: pictures of the data set itself; the first that has no problem with a name is taken before the root.

        Raises:
            DataError: an archive is missing, damaged or of a kind that is not read; names it.
            ConfigError: a package that is needed to read it is not installed.
        """
        self._own, self._urls = own, DataUrls()
        self._source = _open(str(root), allow_outside, remedy, cache_dir, remote)

    def problem(self, name: str) -> str | None:
        """Why the picture of this name cannot be used, as far as is known without reading it; None where it can."""
        return self._of(name).problem(name)

    def picture(self, name: str) -> ImageFile:
        """The picture of a name that has no problem, for `load_image`."""
        return self._of(name).picture(name)

    def forget(self) -> None:
        """Frees what `problem` keeps in memory and `picture` does not need."""
        self._source.forget()

    def _of(self, name: str) -> ImageSource:
        own = next((source for source in self._own if source.problem(name) is None), None)
        return own or (self._urls if name.startswith(PREFIX) else self._source)


def _open(
    root: str, allow_outside: bool, remedy: str, cache_dir: str | Path | None, remote: RemoteConfig | None
) -> ImageSource:
    if is_remote(root):
        return _open_remote(root, RemoteStorage(remote, cache_dir), cache_dir)
    is_pattern = glob.has_magic(root) and not os.path.exists(root)
    if os.path.isdir(root) or not (is_pattern or os.path.exists(root) or _kind(root)):
        folder = ImageFolder(root, allow_outside=allow_outside, remedy=remedy)
        paths = [path for path in _archives_in(root) if allow_outside or folder.is_inside(os.path.realpath(path))]
        return FolderWithArchives(folder, root, paths, cache_dir) if paths else folder
    paths = sorted(path for path in glob.glob(root, recursive=True) if _kind(path)) if is_pattern else [root]
    archives = _archive_set(root, paths, cache_dir)
    archives.load()
    return archives


def _open_remote(root: str, storage: RemoteStorage, cache_dir: str | Path | None) -> ImageSource:
    """Archives by address, by pattern or in a folder; a folder without any holds pictures."""
    if glob.has_magic(root):
        urls = [url for url in storage.find(root) if _kind(url)]
    elif _kind(root):
        urls = [root]
    else:
        folder = RemoteFolder(root, storage)
        urls = [f"{folder.root}{name}" for name, is_file in sorted(folder.names().items()) if is_file and _kind(name)]
        if not urls:
            return folder
    archives = _archive_set(root, urls, cache_dir or storage.cache.folder, storage)
    archives.load()
    return archives


class FolderWithArchives:
    """A folder whose own files come first. Its archives are opened when a name is none of them."""

    def __init__(self, folder: ImageFolder, root: str, paths: Sequence[str], cache_dir: str | Path | None) -> None:
        self._folder, self._root, self._paths, self._cache_dir = folder, root, paths, cache_dir
        self._lock = threading.Lock()

    def problem(self, name: str) -> str | None:
        """Why the picture of this name cannot be used; None where it can."""
        if (problem := self._folder.problem(name)) is None or inner_name(name) is None:
            return problem
        archives = self._archives()
        if isinstance(archives, str):
            return f"{problem}; {archives}"
        found = archives.find(name)
        return problem if found is None else found if isinstance(found, str) else None

    def picture(self, name: str) -> ImageFile:
        """The picture of a name that has no problem."""
        file = self._folder.picture(name)
        if inner_name(name) is None or os.path.isfile(file):
            return file
        archives = self._archives()
        return file if isinstance(archives, str) else archives.picture(name)

    def forget(self) -> None:
        """Frees the lists of files."""
        self._folder.forget()

    def _archives(self) -> ArchiveSet | str:
        """The archives, or why they cannot be used: no reason to stop while no picture is known to be in them."""
        with self._lock:
            return self._opened

    @cached_property
    def _opened(self) -> ArchiveSet | str:
        try:
            archives = _archive_set(self._root, self._paths, self._cache_dir)
            archives.load()
        except ParrotError as error:
            logger.warning("%s", error)
            return str(error)
        return archives


def _archive_set(
    root: str, paths: Sequence[str], cache_dir: str | Path | None, storage: RemoteStorage | None = None
) -> ArchiveSet:
    if not paths:
        raise DataError(f"image root {printable(root)} matches no archive; wanted files that end in {_endings()}")
    archives = []
    for path in paths:
        if (kind := _kind(path)) is None:
            raise DataError(
                f"image root {printable(path)} must be a folder, or a file that ends in {_endings()}; got another file"
            )
        try:
            archives.append(kind(LocalFile(Path(path)) if storage is None else RemoteFile(path, storage)))
        except StorageError:
            raise
        except DataError as error:
            raise DataError(f"image archive {printable(path)} {error}") from error.__cause__
    return ArchiveSet(root, archives, cache_dir)


def _archives_in(folder: str) -> list[str]:
    """Archives that lie directly in a folder."""
    paths: list[str] = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        paths = [entry.path for entry in entries if _kind(entry.name) and entry.is_file()]
    return sorted(paths)


def _kind(path: str) -> type[Archive] | None:
    return next((kind for kind in ARCHIVES if path.lower().endswith(kind.ENDINGS)), None)


def _endings() -> str:
    return ", ".join(kind.ENDINGS[0] for kind in ARCHIVES)
