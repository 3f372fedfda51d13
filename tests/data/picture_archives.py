"""The same pictures as files, in tars, in Parquet files and as data URLs."""

from __future__ import annotations

import base64
import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow
from pyarrow import parquet


def write_files(folder: Path, pictures: Mapping[str, bytes]) -> Path:
    for name, data in pictures.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_tar(path: Path, pictures: Mapping[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in pictures.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_parquet(
    path: Path, pictures: Mapping[str, bytes], *, rows: int = 2, struct: bool = False, large: bool = False
) -> Path:
    """`rows` a row group; `struct` as Hugging Face's Image, with columns of other things beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names, data = list(pictures), list(pictures.values())
    if struct:
        kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        cells = pyarrow.array([{"bytes": d, "path": n} for n, d in zip(names, data, strict=True)], kind)
        table = pyarrow.table({"id": list(range(len(names))), "caption": ["x"] * len(names), "image": cells})
    else:
        kinds = (pyarrow.large_string(), pyarrow.large_binary()) if large else (pyarrow.string(), pyarrow.binary())
        table = pyarrow.table({"caption": ["x"] * len(names)})
        table = table.append_column("jpg", pyarrow.array(data, kinds[1]))
        table = table.append_column("name", pyarrow.array(names, kinds[0]))
    parquet.write_table(table, path, row_group_size=rows)
    return path


def shards(pictures: Mapping[str, bytes], count: int) -> list[dict[str, bytes]]:
    """Dealt out, so that neighbours are in different ones."""
    items = list(pictures.items())
    return [dict(items[i::count]) for i in range(count)]


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def as_data_urls(records: Sequence[dict], pictures: Mapping[str, bytes]) -> list[dict]:
    """The records with their pictures in place of the names."""
    return [{**record, "image": [data_url(pictures[name]) for name in record["image"]]} for record in records]
