"""Arrow files, and what Hugging Face's `Dataset.save_to_disk` writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from parrot_sys.data.row_groups import CACHE
from parrot_sys.data.sources.files import has_files, list_files
from parrot_sys.data.sources.tables import TableFile, TableRecords, holds_bytes, import_arrow, without_bytes
from parrot_sys.errors import DataError, printable
from parrot_sys.files import Fields, read_json

ENDINGS = (".arrow", ".feather", ".ipc")
STATE, SPLITS = "state.json", "dataset_dict.json"
"""Names of the files that Hugging Face's `datasets` writes beside its own, and above the folders of splits."""
_FILE_FORMAT = b"ARROW1"


class ArrowRecords(TableRecords):
    """A block is a record batch; files are mapped into memory, so that a record costs its own bytes."""

    NAME = "Arrow"

    @classmethod
    def takes(cls, path: Path) -> bool:
        """An Arrow file, a pattern of them, a folder that has some, or one of Hugging Face's `datasets`."""
        return any((path / name).is_file() for name in (STATE, SPLITS)) or has_files(path, ENDINGS)

    def files(self) -> list[Path]:
        """The files that `state.json` lists in its order; all Arrow files, sorted, where there is none."""
        if (self.path / SPLITS).is_file():
            raise several_splits(read_json(self.path / SPLITS), str(self.path))
        if not (self.path / STATE).is_file():
            return list_files(self.path, ENDINGS)
        return [self.path / name for name in listed_files(read_json(self.path / STATE), str(self.path))]

    def open(self, path: Path) -> TableFile:
        """Maps it and looks for its batches."""
        return _ArrowFile(path)


def several_splits(content: Mapping[str, Any], folder: str) -> DataError:
    """The error for a folder with a `dataset_dict.json` of this content."""
    splits = Fields(content, f"{folder}/{SPLITS}").items("splits", str)
    split = splits[0] if splits else "train"
    return DataError(
        f"data set {printable(folder)} has several splits: name one, such as {printable(f'{folder}/{split}')}"
    )


def listed_files(state: Mapping[str, Any], folder: str) -> list[str]:
    """Names of the files of a folder that its `state.json` lists.

    Raises:
        DataError: it lists none, or the rows have an order of their own.
    """
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise DataError(
            f"data set {printable(folder)} has an order or a choice of rows of its own: save it after flatten_indices()"
        )
    listed = state.get("_data_files")
    entries = listed if isinstance(listed, list) else []
    names: list[Any] = [each.get("filename") for each in entries if isinstance(each, dict)]
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise DataError(f"{printable(f'{folder}/{STATE}')} must list _data_files of this folder, got {listed!r}")
    return names


class _ArrowFile(TableFile):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        arrow = import_arrow("pyarrow", path)
        source = arrow.memory_map(str(path))
        with path.open("rb") as file:
            self._is_stream = file.read(len(_FILE_FORMAT)) != _FILE_FORMAT
        reader = arrow.ipc.open_stream(source) if self._is_stream else arrow.ipc.open_file(source)
        self._reader, self._arrow = reader, arrow
        self._batches = list(reader) if self._is_stream else []  # (mapped, not read)

    @property
    def schema(self) -> Any:
        return self._reader.schema

    @cached_property
    def blocks(self) -> list[int]:
        return [batch.num_rows for batch in self._all()]

    def rows(self, block: int) -> Any:
        batch = self._batch(block)
        columns = [
            without_bytes(batch.column(name)) if holds_bytes(self.schema, name) else batch.column(name)
            for name in self.schema.names
        ]
        return self._arrow.table(dict(zip(self.schema.names, columns, strict=True)))

    def has_bytes(self, block: int, column: str) -> bool:
        array = self._batch(block).column(column)
        while not self._arrow.types.is_struct(array.type):
            if not hasattr(array, "values"):
                return True
            array = array.values
        data = array.field("bytes")
        return data.null_count < len(data)

    def cell(self, block: int, row: int, column: str) -> Any:
        return self._batch(block).column(column)[row].as_py()

    def add_to(self, digest: Any) -> None:
        """Buffers of all columns as they are in the file."""
        for block in range(len(self.blocks)):
            for column in self.rows(block).columns:
                for chunk in column.chunks:
                    for buffer in chunk.buffers():
                        digest.update(b"" if buffer is None else memoryview(buffer))

    def _all(self) -> Iterator[Any]:
        count = len(self._batches) if self._is_stream else self._reader.num_record_batches
        return (self._batch(i) for i in range(count))

    def _batch(self, block: int) -> Any:
        """A batch: of a stream they are all at hand; of a file, which may be compressed, each is decoded."""
        if self._is_stream:
            return self._batches[block]
        return CACHE.get(
            (str(self.path), self.state, block, "batch"), str(self.path), lambda room: self._reader.get_batch(block)
        )
