"""Files behind addresses: a server process, settings that make its failures quick, folders in several storages."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import fsspec
import fsspec.config
import pytest
import s3fs

from parrot_sys.data.remote.config import RemoteConfig
from tests.data.object_server import Server, serve

GS = pytest.param(
    "gs", marks=pytest.mark.skipif(importlib.util.find_spec("gcsfs") is None, reason="needs gcsfs (parrot_sys[gcs])")
)
"""Google Cloud Storage as a parameter of a test."""
QUICK = RemoteConfig(first_wait=0.02, attempts=4, timeout=2)


@contextlib.contextmanager
def storage(folder: Path) -> Iterator[Server]:
    """Serves the folders in `folder` as buckets; `s3://` and `gs://` mean that server."""
    before, retries = dict(fsspec.config.conf), s3fs.S3FileSystem.retries
    with serve(folder) as server, _without_googles_retries():
        client = {"retries": {"total_max_attempts": 1}}
        fsspec.config.conf["s3"] = {"endpoint_url": server.url, "key": "k", "secret": "s", "config_kwargs": client}
        fsspec.config.conf["gs"] = {"endpoint_url": server.url, "token": "anon"}
        s3fs.S3FileSystem.retries = 1
        try:
            yield server
        finally:
            s3fs.S3FileSystem.retries = retries
            fsspec.config.conf.clear()
            fsspec.config.conf.update(before)


@contextlib.contextmanager
def _without_googles_retries() -> Iterator[None]:
    """gcsfs, where it is installed, reports a failure at once, and does not try the gRPC service that we lack."""
    if importlib.util.find_spec("gcsfs") is None:
        yield
        return
    with patch.dict(os.environ, {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}):
        retry = importlib.import_module("gcsfs.retry")
        with patch.object(retry, "is_retriable", return_value=False):
            yield


def addresses(server: Server, name: str) -> dict[str, str]:
    """Protocol -> address of something in the served folder."""
    return {"s3": f"s3://{name}", "gs": f"gs://{name}", "http": f"{server.url}/{name}"}


STORES = ("disk", "memory", "s3", "gs", "http")


@contextlib.contextmanager
def served(base: Path) -> Iterator[tuple[Path, Server]]:
    """A folder with a bucket `b`, and what serves it."""
    (base / "b").mkdir()
    with storage(base) as server:
        yield base, server


@dataclass(frozen=True)
class Place:
    """A folder that is written to here, and read at an address."""

    folder: Path
    address: str = ""

    def name(self, path: Path) -> str:
        """What to call a path in the folder to whoever reads it; what was written by then can be read."""
        inner = path.relative_to(self.folder).as_posix()
        if self.address.startswith("memory:"):
            memory = fsspec.filesystem("memory")
            for file in (each for each in self.folder.rglob("*") if each.is_file()):
                memory.pipe(f"/{self.folder.name}/{file.relative_to(self.folder).as_posix()}", file.read_bytes())
        return f"{self.address}/{inner}" if self.address else str(path)


@contextlib.contextmanager
def stored(bucket: tuple[Path, Server] | None, store: str) -> Iterator[Place]:
    """An empty folder in a storage; `s3`, `gs` and `http` are what serves `bucket`."""
    with tempfile.TemporaryDirectory(dir=bucket[0] / "b" if bucket else None) as name:
        folder = Path(name)
        if store == "memory":
            try:
                yield Place(folder, f"memory://{folder.name}")
            finally:
                memory = fsspec.filesystem("memory")
                if memory.exists(f"/{folder.name}"):
                    memory.rm(f"/{folder.name}", recursive=True)
        else:
            yield Place(folder, addresses(bucket[1], f"b/{folder.name}").get(store, "") if bucket else "")
