"""Rows and labels of samples, from what an index says of their ids: no text is encoded again for other limits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from parrot_sys.data.index.columns import Array
from parrot_sys.data.index.record_index import RecordIndex

_BLOCK = 1 << 18  # records at once, so that what is computed on the way stays small
_RECORD = np.int64(1 << 32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """int32 [n], 0 for wrong records."""

    rows: Array
    """Rows of each sample, cut to `max_seq_len`."""
    full_rows: Array
    """Rows before it is cut."""
    labels: Array
    """Rows that bear loss after it is cut."""


def sample_lengths(index: RecordIndex, picture_rows: int | Array, max_seq_len: int) -> Lengths:
    """As `expanded_lengths` and `remaining_labels` count them.

    Args:
        index: n records.
        picture_rows: rows of every picture, or of each of `index.picture_names`.
        max_seq_len: most rows of a sample.
    """
    lengths = Lengths(**{name: np.zeros(len(index), dtype=np.int32) for name in ("rows", "full_rows", "labels")})
    for start in range(0, len(index), _BLOCK):
        _measure(index, picture_rows, max_seq_len, slice(start, min(start + _BLOCK, len(index))), lengths)
    return lengths


def _measure(index: RecordIndex, picture_rows: int | Array, limit: int, records: slice, lengths: Lengths) -> None:
    tokens = index.tokens[records].astype(np.int64)
    ends, first = _ends(index.picture_ends, records)
    starts = np.concatenate([[0], ends[:-1]])
    pictures = slice(first, first + int(ends[-1]))
    markers = index.markers[pictures].astype(np.int64)
    # A picture stands for one id and takes so many rows more.
    own = picture_rows if isinstance(picture_rows, int) else picture_rows[index.pictures[pictures]]
    more = np.zeros(len(markers), dtype=np.int64) + own - 1
    added, kept = _sums(more), _sums(np.where(markers < limit, more, 0))
    lengths.full_rows[records] = tokens + added[ends] - added[starts]
    lengths.rows[records] = np.minimum(np.minimum(tokens, limit) + kept[ends] - kept[starts], limit)

    run_ends, first_run = _ends(index.run_ends, records)
    runs = index.runs[first_run : first_run + int(run_ends[-1])].astype(np.int64)
    owners = np.repeat(np.arange(len(tokens)), np.diff(run_ends, prepend=0))
    marked = np.repeat(np.arange(len(tokens)), ends - starts) * _RECORD + markers
    before = np.searchsorted(marked, owners * _RECORD + runs[:, 0])
    shift = added[before] - added[starts[owners]]  # rows that pictures before a run of labels add
    low, high = np.maximum(runs[:, 0], 1 - shift), np.minimum(np.minimum(runs[:, 1], limit), limit - shift)
    lengths.labels[records] = np.bincount(owners, np.maximum(high - low, 0), len(tokens)).astype(np.int32)


def _ends(all_ends: Array, records: slice) -> tuple[Array, int]:
    """Ends of the records' parts, counted from the first one's start; that start."""
    first = int(all_ends[records.start - 1]) if records.start else 0
    return all_ends[records] - first, first


def _sums(values: Array) -> Array:
    return np.concatenate([[0], np.cumsum(values)])
