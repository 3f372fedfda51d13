"""Paged KV cache, the bookkeeping: which blocks a request holds, and which of them another request may use again.

A block holds the keys and values of `block_size` rows. It may be used again by a request whose rows up to its end are
the same in all that decides keys and values. That is its identity: a hash of the identity of the block before it (so of
all earlier rows), the ids of its rows, and of each picture that its rows hold or read: digest, guidance and offset.
Rows of a picture depend on the text that guided its route, so a picture in another prompt is another picture. Pictures
without a digest are not known again, nor is any row after their first one.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from parrot_sys.errors import ConfigError

BlockHash = bytes
_DIGEST_SIZE = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureSpan:
    """Rows of a request that hold a picture, or that read one."""

    start: int
    """First such row."""
    stop: int
    """One past the last."""
    image: bytes | None
    """Digest of the picture; None where it has none, so that these rows are not used again."""
    guidance: bytes = b""
    """Digest of the text that guided its route; empty where text does not change its rows."""


def digest(*parts: bytes) -> bytes:
    """Hash of a list of byte strings; no two different lists have the same one."""
    result = hashlib.blake2b(digest_size=_DIGEST_SIZE)
    for part in parts:
        result.update(struct.pack("<q", len(part)))
        result.update(part)
    return result.digest()


def ids_digest(ids: Sequence[int]) -> bytes:
    """Hash of token ids."""
    return digest(struct.pack(f"<{len(ids)}q", *ids))


def root_hash(model: bytes, salt: bytes = b"") -> BlockHash:
    """The parent of first blocks.

    Args:
        model: whatever tells one model's keys and values from another's.
        salt: keeps requests with different ones apart, for example those of different customers.
    """
    return digest(model, salt)


def block_hashes(
    parent: BlockHash, ids: Sequence[int], pictures: Sequence[PictureSpan], block_size: int, *, first: int = 0
) -> Iterator[BlockHash]:
    """Identities of the whole blocks of a request, in order; ends where rows cannot be known again.

    Args:
        parent: identity of block `first - 1`, or the root.
        ids: of all rows so far.
        pictures: rows that hold or read pictures, ascending.
        block_size: rows of a block.
        first: number of the first block that is wanted.
    """
    for start in range(first * block_size, len(ids) - block_size + 1, block_size):
        stop = start + block_size
        parts = [parent, struct.pack(f"<{block_size}q", *ids[start:stop])]
        for rows in pictures:
            if rows.start >= stop or rows.stop <= start:
                continue
            if rows.image is None:
                return
            begin = max(rows.start, start)
            place = struct.pack("<3q", begin - rows.start, begin - start, min(rows.stop, stop) - start)
            parts += [rows.image, rows.guidance, place]
        parent = digest(*parts)
        yield parent


class BlockPool:
    """Blocks, who holds them, and which unused ones still have keys and values that a request may find again.

    A block is free when nobody holds it. Free blocks with an identity stay findable until they are given to somebody
    else; those that were free longest go first, and blocks without an identity go before all of them.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """
        Args:
            num_blocks: blocks of the cache.
            block_size: rows of a block.

        Raises:
            ConfigError: there is none of either.
        """
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size)):
            if value < 1:
                raise ConfigError(f"engine.{name} must be >= 1, got {value}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._hashes: list[BlockHash | None] = [None] * num_blocks
        self._blocks: dict[BlockHash, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self.hits = 0
        """Blocks that requests found."""
        self.queries = 0
        """Blocks that requests looked for."""

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def blocks_for(self, rows: int) -> int:
        """Blocks that hold so many rows."""
        return -(-rows // self.block_size)

    def find(self, hashes: Sequence[BlockHash]) -> list[int]:
        """Blocks of the longest run of `hashes` from the first on that are there; the caller holds none of them yet."""
        found = list(itertools.takewhile(lambda block: block is not None, map(self._blocks.get, hashes)))
        return [block for block in found if block is not None]

    def hold(self, blocks: Sequence[int]) -> None:
        """One more holder for each of these blocks."""
        for block in blocks:
            if not self._references[block]:
                del self._free[block]
            self._references[block] += 1

    def num_free_without(self, blocks: Sequence[int]) -> int:
        """Free blocks once somebody holds `blocks`."""
        return self.num_free - sum(not self._references[block] for block in blocks)

    def allocate(self, count: int) -> list[int] | None:
        """New blocks for one holder, without identities; None when there are not enough, and then none is taken."""
        if count > self.num_free:
            return None
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._forget(block)
            self._references[block] = 1
        return blocks

    def register(self, block: int, identity: BlockHash) -> None:
        """Lets others find a block whose rows are all there, or will be when this step's layers read them."""
        assert self._references[block], f"block {block} must be held to get an identity"
        if identity in self._blocks or self._hashes[block] is not None:
            return
        self._blocks[identity] = block
        self._hashes[block] = identity

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less for each of a request's blocks; the last of them are evicted before the first."""
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} is released more often than it was held"
            self._references[block] -= 1
            if not self._references[block]:
                self._free[block] = None
                self._free.move_to_end(block, last=self._hashes[block] is not None)

    def forget_all(self) -> None:
        """Takes the identity of every block: after new weights, or after a step that failed half-way."""
        for block in range(self.num_blocks):
            self._forget(block)

    def _forget(self, block: int) -> None:
        identity, self._hashes[block] = self._hashes[block], None
        if identity is not None:
            del self._blocks[identity]
