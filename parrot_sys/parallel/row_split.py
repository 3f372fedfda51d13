"""Which rank of a context-parallel group works on which rows of a pack."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK_ROWS = 128
"""Rows that a rank takes from one place: at least a tile of the attention kernels, so that tiles see the same keys."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowSplit:
    """T rows dealt over the ranks in chunks, back and forth: 0, 1, .., n-1, n-1, .., 1, 0, and again from rank 0.

    Causal attention costs a row as many keys as lie before it in its sample. Of 2 n chunks in turn, each rank gets two
    whose places add up to the same, so ranks do the same work within every 2 n chunks of a sample, wherever samples
    begin and end. Everything follows from T: nothing has to be read from a device.

    Rows are padded at the end to 2 * size * rounds * chunk, so that all ranks hold as many. Rows on a rank keep the
    order of the pack.
    """

    size: int
    """Ranks, n."""
    num_rows: int
    """T."""
    rounds: int
    """How often the deal goes back and forth."""
    chunk: int
    """Rows in a chunk."""

    @staticmethod
    def of(num_rows: int, size: int, *, multiple_of: int = 1) -> RowSplit:
        """The split of `num_rows` rows over `size` ranks, each of which holds a multiple of `multiple_of` rows."""
        rounds = max(1, num_rows // (2 * size * _CHUNK_ROWS))
        chunk = max(1, -(-num_rows // (2 * size * rounds)))
        unit = multiple_of // math.gcd(multiple_of, 2 * rounds)
        return RowSplit(size=size, num_rows=num_rows, rounds=rounds, chunk=-(-chunk // unit) * unit)

    @property
    def local_rows(self) -> int:
        """Rows on each rank, with padding."""
        return 2 * self.rounds * self.chunk

    @property
    def padding(self) -> int:
        """Rows added after the last."""
        return self.size * self.local_rows - self.num_rows

    def pad(self, rows: Tensor) -> Tensor:
        """[T, ...] -> [size * local_rows, ...], zeros after the last row."""
        return F.pad(rows, (*(0, 0) * (rows.dim() - 1), 0, self.padding)) if self.padding else rows

    def take(self, rows: Tensor, rank: int) -> Tensor:
        """A rank's rows of padded ones: [size * local_rows, ...] -> [local_rows, ...]."""
        chunks = rows.unflatten(0, (self.rounds, 2 * self.size, self.chunk))
        return torch.stack((chunks[:, rank], chunks[:, 2 * self.size - 1 - rank]), dim=1).flatten(0, 2)

    def join(self, by_rank: Tensor) -> Tensor:
        """The rows of all ranks, rank after rank, in the order of the pack: [size * local_rows, ...] both."""
        there, back = by_rank.unflatten(0, (self.size, self.rounds, 2, self.chunk)).unbind(2)
        return torch.cat((there, back.flip(0))).transpose(0, 1).flatten(0, 2)

    def deal(self, rows: Tensor) -> Tensor:
        """The reverse of `join`."""
        chunks = rows.unflatten(0, (self.rounds, 2 * self.size, self.chunk)).transpose(0, 1)
        there, back = chunks.split(self.size)
        return torch.stack((there, back.flip(0)), dim=2).flatten(0, 3)

    def owner(self, rows: Tensor) -> Tensor:
        """Rank that works on each row: integers of any shape."""
        place = rows // self.chunk % (2 * self.size)
        return torch.minimum(place, 2 * self.size - 1 - place)

    def local_index(self, rows: Tensor) -> Tensor:
        """Index of each row among the rows of its rank: integers of any shape."""
        chunk = rows // self.chunk
        turn, place = chunk // (2 * self.size), chunk % (2 * self.size)
        return (2 * turn + (place >= self.size)) * self.chunk + rows % self.chunk
