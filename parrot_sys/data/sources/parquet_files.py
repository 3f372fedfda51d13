"""Parquet files: one, a folder of them, or a pattern."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from parrot_sys.data.row_groups import CACHE, MakeRoom
from parrot_sys.data.sources.files import has_files, list_files
from parrot_sys.data.sources.tables import (
    TableFile,
    TableRecords,
    holds_bytes,
    import_arrow,
    without_bytes,
)

ENDINGS = (".parquet",)


class ParquetRecords(TableRecords):
    """A block is a row group: a record costs decoding one, so they should be small (100 to 1,000 rows)."""

    NAME = "Parquet"

    @classmethod
    def takes(cls, path: Path) -> bool:
        """A Parquet file, a pattern of them, or a folder that has some."""
        return has_files(path, ENDINGS)

    def files(self) -> list[Path]:
        """All Parquet files, sorted."""
        return list_files(self.path, ENDINGS)

    def open(self, path: Path) -> TableFile:
        """Reads its footer."""
        return _ParquetFile(path)


class _ParquetFile(TableFile):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._parquet = import_arrow("pyarrow.parquet", path)
        self._metadata = self._parquet.read_metadata(path)

    @cached_property
    def schema(self) -> Any:
        return self._metadata.schema.to_arrow_schema()

    @cached_property
    def blocks(self) -> list[int]:
        return [self._metadata.row_group(i).num_rows for i in range(self._metadata.num_row_groups)]

    def rows(self, block: int) -> Any:
        return CACHE.get(
            (str(self.path), self.state, block, "rows"), str(self.path), lambda room: self._decode_rows(block, room)
        )

    def has_bytes(self, block: int, column: str) -> bool:
        group = self._metadata.row_group(block)
        for leaf in self._leaves(block, column):
            if self._is_data(leaf):
                chunk = group.column(leaf)
                if not chunk.is_stats_set or chunk.statistics.null_count is None:
                    return True
                return chunk.statistics.null_count < chunk.num_values
        return True

    def cell(self, block: int, row: int, column: str) -> Any:
        key = (str(self.path), self.state, block, column)
        return CACHE.get(key, str(self.path), lambda room: self._decode_cells(block, column, room))[row].as_py()

    def add_to(self, digest: Any) -> None:
        """The column chunks as they are in the file: the same in every version of pyarrow."""
        with self.path.open("rb") as file:
            for block in range(len(self.blocks)):
                for leaf in self._leaves(block):
                    if not self._is_data(leaf):
                        chunk = self._metadata.row_group(block).column(leaf)
                        start = min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)))
                        file.seek(start)
                        digest.update(file.read(chunk.total_compressed_size))

    def _decode_rows(self, block: int, make_room: MakeRoom) -> Any:
        wanted, whole = [], []
        for name in self.schema.names:
            leaves = self._leaves(block, name)
            texts = [leaf for leaf in leaves if not self._is_data(leaf)]
            if not texts or (len(texts) < len(leaves) and not holds_bytes(self.schema, name)):
                texts = leaves
            wanted += texts
            if holds_bytes(self.schema, name) and texts == leaves:
                whole.append(name)
        table = self._read(block, wanted, make_room)
        for name in whole:
            place = table.schema.get_field_index(name)
            table = table.set_column(place, name, without_bytes(table.column(place).combine_chunks()))
        return table

    def _decode_cells(self, block: int, column: str, make_room: MakeRoom) -> Any:
        leaves = self._leaves(block, column)
        data = [leaf for leaf in leaves if self._is_data(leaf)] or leaves
        return self._read(block, data, make_room).column(0)

    def _read(self, block: int, leaves: Sequence[int], make_room: MakeRoom) -> Any:
        chunks = [self._metadata.row_group(block).column(leaf) for leaf in leaves]
        make_room(sum(chunk.total_uncompressed_size for chunk in chunks))
        with self._parquet.ParquetFile(self.path, metadata=self._metadata) as file:
            paths = [chunk.path_in_schema for chunk in chunks]
            # (No threads of Arrow: a forked process has none of them.)
            return file.read_row_group(block, columns=paths, use_threads=False)

    def _leaves(self, block: int, column: str | None = None) -> list[int]:
        """Numbers of the leaf columns, of one column or of all."""
        group = self._metadata.row_group(block)
        paths = [group.column(i).path_in_schema for i in range(group.num_columns)]
        if column is None:
            return list(range(len(paths)))
        return [i for i, path in enumerate(paths) if path == column or path.startswith(f"{column}.")]

    def _is_data(self, leaf: int) -> bool:
        """Whether a leaf column holds bytes, not texts."""
        column = self._metadata.schema.column(leaf)
        return column.physical_type == "BYTE_ARRAY" and column.logical_type.type == "NONE"
