"""Blocks of the paged cache: identities tell apart what differs, and the pool neither loses nor shares by mistake."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from parrot_sys.engine.blocks import BlockPool, PictureSpan, block_hashes, digest, ids_digest, root_hash
from parrot_sys.errors import ConfigError

SIZE = 4
ROOT = root_hash(b"model")
PICTURE = PictureSpan(start=3, stop=9, image=b"cat", guidance=b"question")


def hashes(ids: list[int], *pictures: PictureSpan, root: bytes = ROOT) -> list[bytes]:
    return list(block_hashes(root, ids, pictures, SIZE))


IDS = [7, 8, 9, -200, -200, -200, -200, -200, -200, 5, 6, 7, 1]


@pytest.mark.parametrize(
    ("changed", "first_changed"),
    [
        ({"image": b"dog"}, 0),
        ({"guidance": b"other question"}, 0),  # the same picture, asked otherwise: its rows are others
        ({"start": 4, "stop": 10}, 0),
        ({"start": 3, "stop": 8}, 2),
    ],
)
def test_pictures_are_part_of_the_identity(changed: dict, first_changed: int) -> None:
    own, other = hashes(IDS, PICTURE), hashes(IDS, replace(PICTURE, **changed))
    assert len(own) == len(other) == 3
    assert own[:first_changed] == other[:first_changed]
    assert not set(own[first_changed:]) & set(other)


def test_model_and_salt_are_part_of_the_identity() -> None:
    roots = [root_hash(b"model"), root_hash(b"other"), root_hash(b"model", b"salt"), root_hash(b"modelsalt")]
    assert len({tuple(hashes(IDS, PICTURE, root=root)) for root in roots}) == 4


def test_nothing_is_known_again_from_a_picture_without_digest_on() -> None:
    without = PictureSpan(start=5, stop=7, image=None)
    assert hashes([*range(20)], without) == hashes([*range(20)])[:1]


def test_two_pictures_side_by_side_are_not_one() -> None:
    two = replace(PICTURE, stop=6), replace(PICTURE, start=6)
    assert hashes(IDS, PICTURE)[1:] != hashes(IDS, *two)[1:]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-3, 3), max_size=20), st.lists(st.integers(-3, 3), max_size=20))
def test_common_prefixes_are_common_blocks(one: list[int], two: list[int]) -> None:
    same = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    own, other = hashes(one), hashes(two)
    assert sum(a == b for a, b in zip(own, other, strict=False)) == same // SIZE
    assert len(own) == len(one) // SIZE
    later = list(block_hashes(own[0], one, (), SIZE, first=1)) if own else []
    assert later == own[1:]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=3), max_size=4), st.lists(st.binary(max_size=3), max_size=4))
def test_digests_of_different_lists_differ(one: list[bytes], two: list[bytes]) -> None:
    assert (digest(*one) == digest(*two)) == (one == two)


def test_ids_digest_knows_order_and_length() -> None:
    assert len({ids_digest(ids) for ids in ([], [0], [0, 0], [1, 0], [0, 1])}) == 5


def test_unused_blocks_leave_in_the_order_of_their_last_use_and_tails_before_heads() -> None:
    pool = BlockPool(4, SIZE)
    first, second = pool.allocate(2), pool.allocate(1)
    assert first is not None
    assert second is not None
    for block, name in zip([*first, *second], (b"a", b"b", b"c"), strict=True):
        pool.register(block, name)
    pool.release(second)
    pool.release(first)
    evicted = []
    for _ in range(4):
        before = {name for name in (b"a", b"b", b"c") if pool.find([name])}
        pool.allocate(1)
        evicted += sorted(before - {name for name in (b"a", b"b", b"c") if pool.find([name])})
    assert evicted == [b"c", b"b", b"a"]  # the block without an identity went first, then the one free longest


def test_a_pool_needs_blocks() -> None:
    with pytest.raises(ConfigError, match="num_blocks must be >= 1, got 0"):
        BlockPool(0, 4)
    with pytest.raises(ConfigError, match="block_size must be >= 1, got 0"):
        BlockPool(4, 0)


class Pool(RuleBasedStateMachine):
    """Holders take, share and give back blocks in any order; a model of plain sets says what must be there."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6, SIZE)
        self.held: list[list[int]] = []
        self.names: dict[int, bytes] = {}
        self.count = 0

    @rule(count=st.integers(0, 7))
    def allocate(self, count: int) -> None:
        free = self.pool.num_free
        blocks = self.pool.allocate(count)
        assert (blocks is None) == (count > free)
        if blocks is not None:
            assert not set(blocks) & {block for other in self.held for block in other}
            for block in blocks:
                self.names.pop(block, None)
            self.held.append(blocks)

    @precondition(lambda self: any(self.held))
    @rule(data=st.data())
    def register(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from([block for blocks in self.held for block in blocks]))
        self.count += 1
        self.pool.register(block, b"%d" % self.count)
        self.names.setdefault(block, b"%d" % self.count)

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def reuse(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.names)))
        found = self.pool.find([self.names[block], b"unknown"])
        assert found == [block]
        expected = self.pool.num_free_without(found)
        self.pool.hold(found)
        assert self.pool.num_free == expected
        self.held.append(found)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @precondition(lambda self: self.names)
    @rule()
    def forget(self) -> None:
        self.pool.forget_all()
        assert not any(self.pool.find([name]) for name in self.names.values())
        self.names = {}

    @invariant()
    def nothing_leaks(self) -> None:
        used = {block for blocks in self.held for block in blocks}
        assert self.pool.num_free == self.pool.num_blocks - len(used)
        assert all(self.pool.find([name]) == [block] for block, name in self.names.items())


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
