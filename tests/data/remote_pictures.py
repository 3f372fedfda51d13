"""Pictures behind addresses: a server process, and settings that make its failures quick."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import fsspec.config
import s3fs

from parrot_sys.data.remote.config import RemoteConfig
from tests.data.object_server import Server, serve

QUICK = RemoteConfig(first_wait=0.02, attempts=4, timeout=2)


@contextlib.contextmanager
def storage(folder: Path) -> Iterator[Server]:
    """Serves the folders in `folder` as buckets; `s3://` means that server."""
    before, retries = dict(fsspec.config.conf), s3fs.S3FileSystem.retries
    with serve(folder) as server:
        client = {"retries": {"total_max_attempts": 1}}
        fsspec.config.conf["s3"] = {"endpoint_url": server.url, "key": "k", "secret": "s", "config_kwargs": client}
        s3fs.S3FileSystem.retries = 1
        try:
            yield server
        finally:
            s3fs.S3FileSystem.retries = retries
            fsspec.config.conf.clear()
            fsspec.config.conf.update(before)


def addresses(server: Server, name: str) -> dict[str, str]:
    """Protocol -> address of something in the served folder."""
    return {"s3": f"s3://{name}", "http": f"{server.url}/{name}"}
