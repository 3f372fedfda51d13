"""The same records and pictures in every kind of data set, here and behind addresses."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import yaml
from pyarrow import ipc, parquet

from tests.data.picture_archives import as_data_urls, write_files, write_parquet, write_tar

Records = Sequence[dict[str, Any]]
Pictures = Mapping[str, bytes]
IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def write_json(base: Path, records: Records, pictures: Pictures) -> Path:
    write_files(base, pictures)
    (base / "set.json").write_text(json.dumps(records), encoding="utf-8")
    return base / "set.json"


def write_jsonl(base: Path, records: Records, pictures: Pictures) -> Path:
    write_files(base, pictures)
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (base / "set.jsonl").write_text(lines, encoding="utf-8")
    return base / "set.jsonl"


def table_of(records: Records, pictures: Pictures, cells: str) -> pyarrow.Table:
    """Records as a table; pictures are names, bytes in a struct, or bytes alone. Text alone has no such column."""
    others = {key: [record.get(key) for record in records] for key in ("id", "lang", "conversations")}
    if not any("image" in record for record in records):
        return pyarrow.table(others)
    names = [record["image"] for record in records]
    if cells == "names":
        images = pyarrow.array(names, pyarrow.list_(pyarrow.string()))
    elif cells == "structs":
        values = [[{"bytes": pictures[name], "path": name} for name in each] for each in names]
        images = pyarrow.array(values, pyarrow.list_(IMAGE))
    else:
        images = pyarrow.array([[pictures[name] for name in each] for each in names], pyarrow.list_(pyarrow.binary()))
    return pyarrow.table(others).append_column("images", images)


def write_parquet_set(
    base: Path, records: Records, pictures: Pictures, *, cells: str = "structs", rows: int = 2, files: int = 2
) -> Path:
    base.mkdir(parents=True, exist_ok=True)
    if cells == "names":
        write_files(base, pictures)
    table, size = table_of(records, pictures, cells), -(-len(records) // files)
    for number in range(files):
        part = table.slice(number * size, size)
        parquet.write_table(part, base / f"train-{number:05}.parquet", row_group_size=rows)
    return base


def write_hf(base: Path, records: Records, pictures: Pictures, *, rows: int = 3) -> Path:
    """As Hugging Face's `Dataset.save_to_disk`: streams of record batches, and a file that lists them."""
    base.mkdir(parents=True, exist_ok=True)
    table = table_of(records, pictures, "structs")
    names = [f"data-{i:05}-of-00002.arrow" for i in range(2)]
    half = -(-len(records) // 2)
    for number, name in enumerate(names):
        with ipc.new_stream(str(base / name), table.schema) as writer:
            writer.write_table(table.slice(number * half, half), max_chunksize=rows)
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (base / "state.json").write_text(json.dumps(state))
    (base / "dataset_info.json").write_text("{}")
    return base


def write_arrow(base: Path, records: Records, pictures: Pictures) -> Path:
    """One Arrow file, compressed."""
    base.mkdir(parents=True, exist_ok=True)
    table = table_of(records, pictures, "bytes")
    options = ipc.IpcWriteOptions(compression="lz4")
    with ipc.new_file(str(base / "set.arrow"), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=4)
    return base / "set.arrow"


def write_shards(base: Path, records: Records, pictures: Pictures, *, shards: int = 2) -> list[Path]:
    """WebDataset: a JSON and the pictures of each record."""
    size, paths = -(-len(records) // shards), []
    for number in range(shards):
        members: dict[str, bytes] = {}
        for index, record in enumerate(records[number * size : (number + 1) * size], number * size):
            key = f"part {index % 2}/s{index:06}"
            plain = {name: value for name, value in record.items() if name != "image"}
            members[f"{key}.json"] = json.dumps(plain).encode()
            for i, name in enumerate(record.get("image", ())):
                members[f"{key}.{i}.{name.rsplit('.', 1)[-1]}"] = pictures[name]
        paths.append(write_tar(base / f"shard-{number:03}.tar", members))
    return paths


def write_webdataset(base: Path, records: Records, pictures: Pictures) -> Path:
    write_shards(base, records, pictures)
    return base


def write_energon(base: Path, records: Records, pictures: Pictures) -> Path:
    """A crude data set with a second split."""
    shards = [path.relative_to(base).as_posix() for path in write_shards(base / "shards", records, pictures)]
    write_shards(base / "val", records[:1], pictures, shards=1)
    meta = base / ".nv-meta"
    meta.mkdir()
    split = {"split_parts": {"train": ["shards/shard-{000..001}.tar"], "val": ["val/shard-000.tar"]}, "exclude": []}
    (meta / "split.yaml").write_text(yaml.safe_dump(split))
    (meta / ".info.json").write_text(json.dumps({"shard_counts": dict.fromkeys(shards, 1)}))
    (meta / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")
    return base


def write_mapped(base: Path, records: Records, pictures: Pictures) -> Path:
    """A table with other names, whose turns are JSON, and a file of columns."""
    table = table_of(records, pictures, "structs")
    turns = pyarrow.array([json.dumps(record["conversations"]) for record in records])
    meta = pyarrow.array([{"language": record.get("lang")} for record in records])
    columns = {"id": "uid", "lang": "meta.language", "conversations": "text"}
    renamed = {"uid": table["id"], "text": turns, "meta": meta}
    if "images" in table.column_names:
        renamed["pictures"], columns["images"] = table["images"], "pictures"
    base.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(renamed), base / "set.parquet", row_group_size=3)
    (base / "set.parquet.columns.yaml").write_text(yaml.safe_dump(columns))
    return base / "set.parquet"


WRITERS: dict[str, Callable[[Path, Records, Pictures], Path]] = {
    "json": write_json,
    "jsonl": write_jsonl,
    "parquet": write_parquet_set,
    "parquet names": lambda base, records, pictures: write_parquet_set(base, records, pictures, cells="names", files=1),
    "parquet bytes": lambda base, records, pictures: write_parquet_set(base, records, pictures, cells="bytes", rows=5),
    "hf datasets": write_hf,
    "arrow": write_arrow,
    "webdataset": write_webdataset,
    "energon": write_energon,
    "mapped": write_mapped,
}


def write_urls(base: Path, records: Records, pictures: Pictures) -> Path:
    """Pictures that stand in the records themselves; the files beside them are not read."""
    return write_json(base, as_data_urls(records, pictures), pictures)


def write_archive(base: Path, records: Records, pictures: Pictures) -> Path:
    """Pictures in a tar that lies in the image root, beside a file."""
    path = write_json(base, records, {name: pictures[name] for name in sorted(pictures)[:1]})
    write_tar(base / "rest.tar", pictures)
    return path


def write_picture_table(base: Path, records: Records, pictures: Pictures) -> Path:
    """Pictures in a Parquet file that lies in the image root."""
    write_parquet(base / "pictures.parquet", pictures)
    return write_json(base, records, {})


PLACES = {"data urls": write_urls, "pictures in a tar": write_archive, "pictures in a table": write_picture_table}
"""Other places of pictures."""
KINDS = {**WRITERS, **PLACES}
