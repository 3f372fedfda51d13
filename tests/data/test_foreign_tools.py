"""Data sets and storage of other people's programs, where these are installed (benchmarks/README.md says how)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from parrot_sys.data.config import DataConfig
from parrot_sys.data.loader import ParrotDataLoader
from tests.data.comparing import PICTURES, ROWS, assert_same, record
from tests.data.record_sets import write_json, write_shards
from tests.data.remote_pictures import QUICK

FILES = {f"{i}.{ending}": PICTURES[i] for i, ending in enumerate(("png", "jpg", "png"))}
RECORDS = [{**record(i, sorted(FILES)[: i % 3]), "lang": "en"} for i in range(9)]


def batches(processor, path, **values):
    config = DataConfig(paths=(str(path),), names=("set",), **values)
    return list(ParrotDataLoader(config, processor, num_visual_rows=ROWS, max_seq_len=512, global_batch_size=2))


def test_a_folder_of_energon_prepare_is_read(processor, tmp_path):
    pytest.importorskip("megatron.energon", exc_type=ImportError)
    write_shards(tmp_path / "set", RECORDS, FILES)
    program = shutil.which("energon", path=str(Path(sys.executable).parent))
    options = ["--non-interactive", "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset"]
    subprocess.run([program, "prepare", *options, str(tmp_path / "set")], check=True, timeout=300)
    assert (tmp_path / "set/.nv-meta/split.yaml").is_file()
    wanted = batches(processor, write_json(tmp_path / "json", RECORDS, FILES))
    assert_same(batches(processor, tmp_path / "set"), wanted)


def test_google_cloud_storage(processor, tmp_path, monkeypatch):
    """Against an emulator of it, through gcsfs."""
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # (a gRPC service, which the emulator lacks)
    pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    import fsspec

    server = emulator.create_server("localhost", 0, in_memory=True, default_bucket="b")
    server.start()
    try:
        port = server._api._httpd.server_port
        fs = fsspec.filesystem("gs", token="anon", endpoint_url=f"http://localhost:{port}")
        folder = write_json(tmp_path / "set", RECORDS, FILES).parent
        for path in folder.iterdir():
            fs.pipe(f"b/set/{path.name}", path.read_bytes())
        monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon", "endpoint_url": f"http://localhost:{port}"})
        wanted = batches(processor, folder / "set.json")
        found = batches(processor, "gs://b/set/set.json", cache_dir=str(tmp_path / "cache"), remote=QUICK)
        assert_same(found, wanted)
    finally:
        server.stop()
