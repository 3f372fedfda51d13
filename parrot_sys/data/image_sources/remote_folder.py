"""RemoteFolder: pictures that are files behind an address."""

from __future__ import annotations

import io
import posixpath
from dataclasses import dataclass

from parrot_sys.data.image_sources.base import inner_name, shown
from parrot_sys.data.remote.storage import RemoteStorage
from parrot_sys.errors import printable

_UNLISTED = ("http://", "https://")
"""Web servers give no list of files: that a picture is missing shows when it is read."""


class RemoteFolder:
    """Files below an address. Each folder is listed once, where the storage gives lists, and no file is opened."""

    def __init__(self, root: str, storage: RemoteStorage) -> None:
        self.root, self._storage = root.rstrip("/") + "/", storage
        self._folders: dict[str, dict[str, bool]] = {}

    def names(self) -> dict[str, bool]:
        """Names directly in the root -> whether they are files; empty where there are no lists."""
        return {} if self.root.lower().startswith(_UNLISTED) else self._list("")

    def problem(self, name: str) -> str | None:
        """Why the file of this name cannot be used, as far as lists say; None where it can."""
        plain = inner_name(name)
        if plain is None:
            return f"image {shown(name)} leads out of the image root {printable(self.root)}"
        if self.root.lower().startswith(_UNLISTED):
            return None
        folder, file = posixpath.split(plain)
        is_file = self._list(folder).get(file)
        if is_file is None:
            return f"image {shown(self.root + name)} is missing"
        return None if is_file else f"image {shown(self.root + name)} is a folder; wanted a regular file"

    def picture(self, name: str) -> RemoteImage:
        """The file of a name that has no problem."""
        return RemoteImage(self.root + (inner_name(name) or name), self._storage)

    def forget(self) -> None:
        """Frees the lists of files."""
        self._folders.clear()

    def _list(self, folder: str) -> dict[str, bool]:
        if folder not in self._folders:
            self._folders[folder] = self._storage.names(self.root + folder)
        return self._folders[folder]


@dataclass(frozen=True, slots=True)
class RemoteImage:
    """A picture behind an address, for `load_image`."""

    url: str
    storage: RemoteStorage

    def open(self) -> io.BytesIO:
        """Its bytes, from the cache on disk if they are those that the storage has now."""
        return io.BytesIO(self.storage.read_whole(self.url))

    def __str__(self) -> str:
        return self.url
