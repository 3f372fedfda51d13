"""Files of users and of other programs, read with care, and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast, overload

from parrot_sys.errors import CheckpointError, ConfigError, ParrotError

T = TypeVar("T", bool, int, float, str, list[Any], dict[str, Any])

_WANTED = {
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
    str: "a string",
    list: "a list",
    dict: "an object",
}
_CODE_KEY = "auto_map"
"""Key by which a file asks for Python code beside it."""


def replace_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file at once: whoever reads it finds what was there before or all of `text`.

    Raises:
        OSError: it cannot be written; what was there before still is, and nothing else is left behind.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def save_tensors(tensors: Mapping[str, Any], path: Path) -> None:
    """Writes a safetensors file with the mode that the umask gives; the library's own is 0600."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode & 0o777
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(mode)


@contextlib.contextmanager
def errors_named(
    file: object, error: type[ParrotError] = CheckpointError, *, what: str = "cannot be read"
) -> Iterator[None]:
    """Turns every exception of a library that works on a user's file into `error`, with the file's name.

    Raises:
        ParrotError: `error`; errors of this package pass as they are.
    """
    try:
        yield
    except (ParrotError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except OSError as reason:
        raise error(f"{file} {what}: {reason.strerror or reason}") from reason
    except BaseException as reason:  # a panic of a library in Rust is no Exception
        raise error(f"{file} {what}: {type(reason).__name__}: {reason}") from reason


def read_json(path: Path, error: type[ParrotError] = CheckpointError) -> dict[str, Any]:
    """The object in a JSON file that another program may have written; nothing that it names is executed.

    Raises:
        ParrotError: `error`: the file is missing, is no JSON, holds no object, or wants Python code to be run.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        value = json.loads(text)
    except FileNotFoundError:
        raise error(f"{path} is missing") from None
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror}") from reason
    except (ValueError, RecursionError) as reason:
        raise error(f"{path} is not valid JSON: {reason}") from reason
    if not isinstance(value, dict):
        raise error(f"{path} must hold a JSON object, got {type(value).__name__}")
    if value.get(_CODE_KEY):
        raise error(
            f"{path}: {_CODE_KEY} asks for Python code of the checkpoint ({reprlib.repr(value[_CODE_KEY])}), which is "
            f"never run: remove {_CODE_KEY} where the classes of transformers do, or use another checkpoint"
        )
    return value


@contextlib.contextmanager
def naming_file(file: object) -> Iterator[None]:
    """Adds the name of the file to a ConfigError about a value that was read from it."""
    try:
        yield
    except ConfigError as error:
        raise (error if str(file) in str(error) else ConfigError(f"{file}: {error}")) from error


class Fields:
    """Typed access to a JSON object that another program wrote: null counts as absent, a wrong type is an error.

    Args:
        values: the object; None is an empty one.
        file: its name in messages.
        prefix: of its keys in messages, with a dot at the end.
    """

    def __init__(self, values: Mapping[str, Any] | None, file: object, prefix: str = "") -> None:
        self.values = {key: value for key, value in (values or {}).items() if value is not None}
        self.file = file
        self.prefix = prefix

    def __contains__(self, key: str) -> bool:
        return key in self.values

    @overload
    def get(self, key: str, kind: type[T]) -> T | None: ...
    @overload
    def get(self, key: str, kind: type[T], default: T) -> T: ...
    def get(self, key: str, kind: type[T], default: T | None = None) -> T | None:
        """The value of a key as `kind` (bool, int, float, str, list or dict); `default` when it is absent.

        Raises:
            ConfigError: it has another type.
        """
        if key not in self.values:
            return default
        return self._typed(self.values[key], kind, key)

    def require(self, key: str, kind: type[T]) -> T:
        """The value of a key that must be there.

        Raises:
            ConfigError: it is absent or has another type.
        """
        value = self.get(key, kind)
        if value is None:
            raise ConfigError(f"{self.file}: {self.prefix}{key} is missing; it must be {_WANTED[kind]}")
        return value

    def items(self, key: str, kind: type[T], count: int | None = None) -> list[T]:
        """The values of a list; `count`, when given, is how many there must be.

        Raises:
            ConfigError: the list is absent, an item has another type, or there are more or fewer.
        """
        values = self.require(key, list)
        if count is not None and len(values) != count:
            raise self.wrong(key, f"a list of {count}")
        return [self._typed(value, kind, f"{key}[{index}]") for index, value in enumerate(values)]

    def below(self, key: str) -> Fields:
        """The object at a key; an empty one when it is absent."""
        return Fields(self.get(key, dict), self.file, f"{self.prefix}{key}.")

    def require_value(self, key: str, wanted: Any, why: str) -> None:
        """Refuses every value of a key but `wanted`, which is what an absent one means.

        Raises:
            ConfigError: it has another value; ends with `why`.
        """
        if self.get(key, type(wanted), wanted) != wanted:
            raise ConfigError(f"{self.wrong(key, repr(wanted))}; {why}")

    def wrong(self, key: str, wanted: str) -> ConfigError:
        """The error that says what a key must be."""
        return ConfigError(
            f"{self.file}: {self.prefix}{key} must be {wanted}, got {reprlib.repr(self.values.get(key))}"
        )

    def _typed(self, value: Any, kind: type[T], key: str) -> T:
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):
                value = float(value)
                fits = math.isfinite(value)
        if not fits:
            raise ConfigError(
                f"{self.file}: {self.prefix}{key} must be {_WANTED[kind]}, got {reprlib.repr(value)} "
                f"({type(value).__name__})"
            )
        return cast(T, value)
