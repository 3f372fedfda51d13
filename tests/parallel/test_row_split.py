"""Which rank gets which rows of a pack, and how evenly."""

from __future__ import annotations

import pytest
import torch

from parrot_sys.parallel import RowSplit

SIZES = [1, 2, 3, 4, 8]
ROWS = [0, 1, 3, 7, 16, 37, 511, 1024, 4099]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("multiple", [1, 4])
def test_every_row_is_on_one_rank_and_comes_back(size: int, multiple: int) -> None:
    for num_rows in ROWS:
        split = RowSplit.of(num_rows, size, multiple_of=multiple)
        rows = torch.arange(num_rows + split.padding).unsqueeze(1).expand(-1, 2)
        by_rank = [split.take(rows, rank) for rank in range(size)]
        assert {part.shape for part in by_rank} == {(split.local_rows, 2)}
        assert split.local_rows % multiple == 0
        assert split.local_rows > 0
        assert torch.equal(split.join(torch.cat(by_rank)), rows)
        assert torch.equal(split.deal(rows), torch.cat(by_rank))
        for rank, part in enumerate(by_rank):
            assert torch.equal(part[:, 0], part[:, 0].sort().values)
            assert (split.owner(part) == rank).all()
            assert torch.equal(split.local_index(part[:, 0]), torch.arange(split.local_rows))


def test_padding_fills_up_with_zeros_and_stays_small() -> None:
    split = RowSplit.of(5, 2)
    assert (split.chunk, split.rounds, split.padding) == (2, 1, 3)
    assert split.pad(torch.ones(5, 2, 3))[:, 0, 0].tolist() == [1.0] * 5 + [0.0] * 3
    assert split.pad(torch.ones(5, dtype=torch.int64)).tolist() == [1] * 5 + [0] * 3
    for size in (2, 4, 8):
        for num_rows in range(2 * size * 128, 20_000, 977):
            assert RowSplit.of(num_rows, size).padding <= num_rows / 128


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("lengths", [[16384], [9000, 7384], [11000, *[300] * 18], [300] * 54])
def test_causal_work_is_even_wherever_samples_end(size: int, lengths: list[int]) -> None:
    split = RowSplit.of(sum(lengths), size)
    keys = split.pad(torch.cat([torch.arange(1, length + 1) for length in lengths]).double())
    work = torch.tensor([split.take(keys, rank).sum().item() for rank in range(size)])
    if len(lengths) == 1:
        assert work.max() == work.min()
    # In the round of chunks where a sample ends, some ranks have its last rows and others the next one's first.
    assert work.max() <= 1.15 * work.mean()
