"""Parquet files with a column of names and one of bytes, or with Hugging Face's struct of `bytes` and `path`."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

from parrot_sys.data.image_files import OpenFile
from parrot_sys.data.image_sources.archive import Archive, Member
from parrot_sys.data.row_groups import CACHE, MakeRoom
from parrot_sys.errors import ConfigError, DataError
from parrot_sys.files import errors_named

_NAMES = ("path", "name", "file_name", "filename", "image_path", "image_name", "image_id", "key", "__key__", "id")
"""Columns that are taken for the names, in this order, where there are several of strings."""


class ParquetArchive(Archive):
    """A Parquet file. A place is a row group and a row in it; the whole row group has to be decoded for a picture."""

    ENDINGS = (".parquet",)

    def members(self, advance: Callable[[int], object]) -> Iterator[Member]:
        """All rows with a name; only the column of names is read, and only of row groups that hold bytes."""
        with errors_named(f"image archive {self.name}", DataError), self._file() as file:
            names, data = self._columns(file.schema_arrow)
            groups = file.num_row_groups
            for group in range(groups):
                if _holds_bytes(file.metadata.row_group(group), data):
                    yield from _members(_read(file, group, names), group)
                advance(self.state[0] * (group + 1) // groups - self.state[0] * group // groups)

    def open(self, first: int, second: int) -> OpenFile:
        """The bytes of a row, as a file."""
        self.file.check()
        column = CACHE.get(
            (self.file.name, self.state, first), self.name, lambda make_room: self._decode(first, make_room)
        )
        data = column[second].as_py()
        if data is None:
            raise DataError("has no bytes: its cell is null")
        return io.BytesIO(data)

    def _decode(self, group: int, make_room: MakeRoom) -> Any:
        """The pictures of a row group, as an Arrow column."""
        with self._file() as file:
            _, data = self._columns(file.schema_arrow)
            metadata = file.metadata.row_group(group)
            columns = [metadata.column(i) for i in range(metadata.num_columns)]
            make_room(sum(c.total_uncompressed_size for c in columns if c.path_in_schema == data))
            return _read(file, group, data)

    def _file(self) -> Any:
        try:
            from pyarrow import parquet
        except ImportError:
            raise ConfigError(
                f"image archive {self.name} needs pyarrow; fix: pip install 'parrot_sys[parquet]'"
            ) from None
        return parquet.ParquetFile(self.file.for_arrow())

    def _columns(self, schema: Any) -> tuple[str, str]:
        """Paths of the column of names and of the one of bytes."""
        import pyarrow

        structs, texts, data = [], [], []
        for field in schema:
            kind = field.type
            if pyarrow.types.is_struct(kind) and {"bytes", "path"} <= {kind.field(i).name for i in range(len(kind))}:
                structs.append(field.name)
            elif _is_text(kind):
                texts.append(field.name)
            elif _is_bytes(kind):
                data.append(field.name)
        if len(structs) == 1:
            return f"{structs[0]}.path", f"{structs[0]}.bytes"
        names = texts if len(texts) == 1 else [name for name in _NAMES if name in texts]
        if structs or len(data) != 1 or not names:
            raise DataError(
                f"image archive {self.name} must have one column of bytes and one of names ({_NAMES[0]}, "
                f"{_NAMES[1]}, ...), or one struct of `bytes` and `path`; got "
                + ", ".join(f"{field.name}: {field.type}" for field in schema)
            )
        return names[0], data[0]


def _read(file: Any, group: int, path: str) -> Any:
    """A column of a row group. (No threads of Arrow: a forked process has none of them.)"""
    from pyarrow import compute, types

    column = file.read_row_group(group, columns=[path], use_threads=False).column(0)
    return compute.struct_field(column, path.rsplit(".", 1)[-1]) if types.is_struct(column.type) else column


def _members(names: Any, group: int) -> Iterator[Member]:
    for row, name in enumerate(names.to_pylist()):
        if name is not None:
            yield Member(str(name), group, row)


def _holds_bytes(group: Any, path: str) -> bool:
    """Whether any cell of a column is not null; true as well where the file does not say."""
    chunks = (group.column(i) for i in range(group.num_columns))
    statistics = next(chunk.statistics for chunk in chunks if chunk.path_in_schema == path)
    return statistics is None or statistics.null_count is None or statistics.null_count < group.num_rows


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_bytes(kind: Any) -> bool:
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
