"""RemoteStorage: stat, list and read files through fsspec; what fails for a while is tried again."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import logging
import os
import posixpath
import random
import re
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from parrot_sys.data.remote.cache import DiskCache
from parrot_sys.data.remote.config import RemoteConfig
from parrot_sys.errors import ConfigError, DataError, StorageError, printable

logger = logging.getLogger(__name__)
T = TypeVar("T")
_ADDRESS = re.compile(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]+(://|::)")
_LONGEST_WAIT = 30.0
_LARGEST = 1 << 30
_FINAL = (
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError),
    *(ValueError, TypeError, LookupError, NotImplementedError, ImportError),
)
"""Errors that another attempt does not change; fsspec raises NotImplementedError for what a protocol cannot do."""
_FINAL_NAMES = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "RefreshError")
_WAIT_AND_TRY = (408, 425, 429)
_CHANGE = ("ETag", "etag", "md5Hash", "generation", "Content-MD5", "Digest", "Last-Modified", "LastModified", "mtime")
"""Facts that file systems state of a file's content: another value means another content."""
_PACKAGES = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
"""Protocol -> extra of this package that brings what it needs."""


def is_remote(path: str | Path) -> bool:
    """Whether a path is an address (`s3://bucket/a.tar`), and no file of this machine."""
    return isinstance(path, str) and _ADDRESS.match(path) is not None


class RemoteState(NamedTuple):
    """Value that tells one content of a file from another."""

    size: int
    change: int


class RemoteStorage:
    """Safe to use from several threads and after a fork."""

    def __init__(self, config: RemoteConfig | None = None, cache_dir: str | Path | None = None) -> None:
        """
        Args:
            config: attempts, waits, size of the cache.
            cache_dir: folder that has `remote` for copies of what was read; None takes the system's folder for
                temporary files.
        """
        self.config = config or RemoteConfig()
        folder = Path(cache_dir or f"{tempfile.gettempdir()}/parrot-cache-{os.getuid()}") / "remote"
        self.cache = DiskCache(folder, int(self.config.cache_gb * 1e9))
        self._random = random.Random()

    def state(self, url: str) -> RemoteState:
        """Size and content mark of a file.

        Raises:
            DataError: it is not there; the reason, without its address.
            StorageError: the storage does not answer, or not with a size.
        """
        fs, path = self._open(url)
        info = self._try(url, lambda: self._call(fs, "info", path))
        if info.get("type") == "directory":
            raise DataError("is a folder; wanted a file")
        if not isinstance(size := info.get("size"), int):
            raise StorageError(f"{printable(url)}: the storage does not tell its size, so no part of it can be read")
        marks = repr([str(info[name]) for name in _CHANGE if info.get(name) is not None])
        return RemoteState(size, int.from_bytes(hashlib.sha256(marks.encode()).digest()[:7], "little"))

    def read(self, url: str, state: RemoteState, start: int, size: int, *, keep: bool = True) -> bytes:
        """A stretch of a file, from the cache if it has it.

        Args:
            url: address.
            state: of the file as it was when `start` and `size` became known.
            start: first byte.
            size: bytes; fewer than that is an error.
            keep: also put it into the cache.

        Raises:
            DataError: the file is not there.
            StorageError: the storage does not answer, or the file is shorter.
        """
        if size == 0:
            return b""
        key = hashlib.sha256(repr((url, *state, start, size)).encode()).hexdigest()
        if keep and (found := self.cache.get(key)) is not None:
            return found
        fs, path = self._open(url)

        def fetch() -> bytes:
            data: bytes = self._call(fs, "cat_file", path, start=start, end=start + size)
            if len(data) > size:
                raise StorageError(f"{printable(url)}: the server ignores ranges and sends the whole file")
            if len(data) < size:
                raise OSError(f"{len(data)} bytes came from byte {start}, wanted {size}")
            return data

        data = self._try(url, fetch)
        if keep:
            self.cache.put(key, data)
        return data

    def read_whole(self, url: str) -> bytes:
        """A small file; from the cache if the storage says that it has not changed.

        Raises:
            DataError: it is not there, or too large to be read as one.
            StorageError: the storage does not answer.
        """
        state = self.state(url)
        if state.size > _LARGEST:
            raise DataError(f"has {state.size} bytes, more than the {_LARGEST} that are read at once")
        return self.read(url, state, 0, state.size)

    def names(self, folder: str) -> dict[str, bool]:
        """Last part of each name in a folder -> whether it is a file; empty where there is no such folder.

        Raises:
            StorageError: the storage does not answer.
        """
        fs, path = self._open(folder)
        try:
            entries = self._try(folder, lambda: self._call(fs, "ls", path, detail=True))
        except DataError as error:
            if isinstance(error, StorageError):
                raise
            return {}
        return {
            entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry.get("type") != "directory"
            for entry in entries
            if entry["name"].rstrip("/") != path.rstrip("/")
        }

    def find(self, pattern: str) -> list[str]:
        """Addresses of the files that a pattern (`s3://bucket/shards/*.tar`) matches, sorted."""
        fs, path = self._open(pattern)
        try:
            found = self._try(pattern, lambda: self._call(fs, "glob", path, detail=True))
        except StorageError:
            raise
        except DataError:
            return []
        files = (name for name, info in found.items() if info.get("type") != "directory")
        return sorted(map(fs.unstrip_protocol, files))

    def below(self, folder: str) -> dict[str, str]:
        """Path below a folder -> address of each file in it, sorted."""
        fs, base = self._open(folder)
        files = self.find(f"{folder.rstrip('/')}/**")  # (whose addresses may be spelled otherwise: gs:// for gcs://)
        return {posixpath.relpath(fs._strip_protocol(address), base.rstrip("/")): address for address in files}

    def _open(self, url: str) -> tuple[Any, str]:
        """The file system of an address (one for each process and thread), and the path there."""
        protocol = re.split("::|://", url, maxsplit=1)[0].lower()
        try:
            return _fsspec().url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            extra = _PACKAGES.get(protocol)
            fix = f"pip install 'parrot_sys[{extra}]'" if extra else "install the fsspec package for it"
            raise ConfigError(f"{printable(url)} cannot be opened: {error}; fix: {fix}") from None

    def _call(self, fs: Any, method: str, *arguments: Any, **named: Any) -> Any:
        """A method of a file system, given up after the time that an attempt has."""
        if getattr(fs, "async_impl", False) and not fs.asynchronous:
            coroutine = getattr(fs, f"_{method}")
            sync = importlib.import_module("fsspec.asyn").sync
            return sync(fs.loop, coroutine, *arguments, timeout=self.config.timeout, **named)
        return getattr(fs, method)(*arguments, **named)

    def _reason(self, error: BaseException) -> str:
        if type(error).__name__ == "FSTimeoutError":
            return f"no answer within {self.config.timeout:g} s"
        return f"{type(error).__name__}: {printable(error)}".rstrip(": ")

    def _try(self, url: str, call: Callable[[], T]) -> T:
        """Result of a call, once it has one.

        Raises:
            DataError: the file is missing or must not be read.
            StorageError: it failed as often as it may.
        """
        for attempt in itertools.count(1):
            try:
                return call()
            except StorageError:
                raise
            except Exception as caught:  # (each file system raises what its own library raises)
                error = _true_error(caught)
                if _is_missing(error):
                    raise DataError("is missing") from None
                if _is_final(error):
                    raise StorageError(
                        f"{printable(url)} cannot be read: {self._reason(error)}; check the address and the keys"
                    ) from error
                reason = self._reason(error)
                if attempt >= self.config.attempts:
                    raise StorageError(
                        f"{printable(url)} cannot be read: {attempt} attempts failed, the last with {reason}; start "
                        "again when the storage answers, or raise data.remote.attempts or data.remote.timeout"
                    ) from error
                wait = min(self.config.first_wait * 2 ** (attempt - 1), _LONGEST_WAIT)
                wait *= self._random.uniform(0.5, 1.0)  # (many processes that failed at once come back spread out)
                logger.warning("%s: attempt %d failed (%s); the next in %.1f s", printable(url), attempt, reason, wait)
                time.sleep(wait)
        raise AssertionError("the loop ends by itself")


def _true_error(error: BaseException) -> BaseException:
    """The error that a "not found" hides: over HTTP, fsspec calls every failure of a request for the size so."""
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None and not _is_missing(error.__cause__):
        error = error.__cause__
    return error


def _is_missing(error: BaseException) -> bool:
    if isinstance(error, FileNotFoundError):
        return error.__cause__ is None or _is_missing(error.__cause__)
    response = getattr(error, "response", None)  # of botocore
    code = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    return getattr(error, "status", code) in (404, 410)


def _is_final(error: BaseException) -> bool:
    if isinstance(error, _FINAL) or type(error).__name__ in _FINAL_NAMES or str(error).startswith("Forbidden: "):
        return True  # (gcsfs says only in words that keys are wrong)
    status = error.status if hasattr(error, "status") else getattr(error, "code", None)  # of aiohttp; of gcsfs
    return isinstance(status, int) and 400 <= status < 500 and status not in _WAIT_AND_TRY


@cache
def _fsspec() -> Any:
    return importlib.import_module("fsspec.core")
