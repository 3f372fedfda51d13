"""ImageFolder: which of the image names that records give are files that may be read."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Literal

from parrot_sys.data.image_files import check_regular
from parrot_sys.data.image_sources.base import shown
from parrot_sys.errors import DataError

_Kind = Literal["file", "link", "other"]
REMEDY = "name the folder in data.image_roots, or set data.allow_outside_root=true for records that you trust"


class ImageFolder:
    """Files below an image root. Lists each folder once and opens no file, so that many names are checked quickly.

    Records come from other people, so their names must not lead out of the root, by `..`, by an absolute name or by a
    symbolic link, unless `allow_outside` says so.
    """

    def __init__(self, root: str | Path, *, allow_outside: bool = False, remedy: str = REMEDY) -> None:
        self._root = str(root)
        self._allow_outside = allow_outside
        self._remedy = remedy
        self._real_root = os.path.realpath(self._root)
        self._folders: dict[str, tuple[bool, dict[str, _Kind]]] = {}

    def problem(self, name: str) -> str | None:
        """Why the file of this name cannot be used; None where it can."""
        path = os.path.join(self._root, name)
        folder, file = os.path.split(path)
        try:
            inside, kinds = self._list(folder)
            kind = kinds.get(file)
            if kind != "file" or file in ("", ".", ".."):
                # A link, another kind of file, or a name that the file system knows in another spelling.
                check_regular(path)
                inside = inside and self.is_inside(os.path.realpath(path))
        except DataError as error:
            return f"image {shown(path)} {error}"
        except (FileNotFoundError, NotADirectoryError):
            return f"image {shown(path)} is missing"
        except OSError as error:
            return f"image {shown(path)} cannot be read: {error.strerror}"
        except ValueError:  # a NUL, half a surrogate pair
            return f"image {shown(path)} cannot be read: no file can have this name"
        if inside or self._allow_outside:
            return None
        return f"image {shown(path)} leads out of the image root {self._root}: {self._remedy}"

    def picture(self, name: str) -> str:
        """The file of a name, for `load_image`."""
        return os.path.join(self._root, name)

    def forget(self) -> None:
        """Frees the lists of files."""
        self._folders.clear()

    def _list(self, folder: str) -> tuple[bool, dict[str, _Kind]]:
        """Whether a folder is inside the root, and what is in it."""
        if folder not in self._folders:
            kinds: dict[str, _Kind] = {}
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                for entry in entries:
                    link, regular = entry.is_symlink(), entry.is_file(follow_symlinks=False)
                    kinds[entry.name] = "link" if link else "file" if regular else "other"
            self._folders[folder] = (self.is_inside(os.path.realpath(folder)), kinds)
        return self._folders[folder]

    def is_inside(self, real: str) -> bool:
        """Whether a real path is below the root."""
        return os.path.commonpath([real, self._real_root]) == self._real_root
