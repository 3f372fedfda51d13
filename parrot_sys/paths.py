"""Settings that name files and folders; places that cannot be written are found before any work is done."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from parrot_sys.config_values import section_class
from parrot_sys.errors import ConfigError
from parrot_sys.files import errors_named


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Marks a setting as a path: `output: Annotated[Path, OUTPUT_FOLDER]`."""

    writes: bool
    folder: bool | None
    """Whether it is a folder; None where it may be either."""
    beside: bool = False
    """It is written beside and renamed, so that it appears at once."""


INPUT_FOLDER = Place(writes=False, folder=True)
INPUT_FILE = Place(writes=False, folder=False)
INPUT = Place(writes=False, folder=None)
OUTPUT_FOLDER = Place(writes=True, folder=True)
NEW_FOLDER = Place(writes=True, folder=True, beside=True)
OUTPUT_FILE = Place(writes=True, folder=False)
NEW_FILE = Place(writes=True, folder=False, beside=True)


def path_settings(cls: type, prefix: str = "") -> dict[str, Place]:
    """Dotted name -> place of every setting below a configuration class that is marked as a path."""
    found: dict[str, Place] = {}
    marked, plain = get_type_hints(cls, include_extras=True), get_type_hints(cls)
    for field in dataclasses.fields(cls):
        places = [each for each in getattr(marked[field.name], "__metadata__", ()) if isinstance(each, Place)]
        if places:
            found[prefix + field.name] = places[0]
        elif (section := section_class(plain[field.name])) is not None:
            found |= path_settings(section, f"{prefix}{field.name}.")
    return found


def check_outputs(config: Any) -> None:
    """Makes sure that every place that a configuration writes to can be written; leaves nothing behind.

    Raises:
        ConfigError: one cannot, or is a file where a folder is wanted or the other way round.
    """
    for name, place in path_settings(type(config)).items():
        if place.writes:
            for path in _values(config, name):
                check_writable(path, place, name)


def _values(config: Any, name: str) -> Iterator[Path]:
    for part in name.split("."):
        config = getattr(config, part, None)
    for value in config if isinstance(config, tuple | list) else (config,):
        if value:
            yield Path(value)


def check_writable(path: Path, place: Place = OUTPUT_FOLDER, name: str = "output") -> None:
    """Creates a nameless file where `path` will be, or opens the file that it is.

    Args:
        path: need not exist.
        place: what is written there.
        name: of the setting, for the message.

    Raises:
        ConfigError: it cannot be written.
    """
    with errors_named(f"{name} {path}", ConfigError, what="cannot be written"):
        exists = _exists(path)
        if exists and path.is_dir() != place.folder:
            wanted, got = ("folder", "file") if place.folder else ("file", "folder")
            raise ConfigError(f"{name} must be a {wanted}, got the {got} {path}: choose another place")
        nearest = path.absolute()
        if place.beside or not exists:
            nearest = nearest.parent
            while not _exists(nearest):
                nearest = nearest.parent
        if nearest.is_dir() or nearest != path.absolute():
            with tempfile.TemporaryFile(dir=nearest):
                pass
        else:
            with nearest.open("r+b"):
                pass


def _exists(path: Path) -> bool:
    """Also of a link that leads nowhere; a name that no file can have is an OSError."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
