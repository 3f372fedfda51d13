"""What each context-parallel rank gets of a micro-batch: every label row and every image once."""

from __future__ import annotations

import pytest
import torch

from parrot_sys.data.batch import PackedBatch
from parrot_sys.data.context_share import share_of_rank
from tests.megatron.parrot_reference import MIXED, Sample, make_batch

BATCHES = {
    "mixed": make_batch(MIXED),
    "pixels": make_batch(MIXED, pixels=True),
    "text-only": make_batch((Sample(prompt=4, images=0, answer=3),)),
    "five images": make_batch((Sample(prompt=3, images=5, answer=20), Sample(prompt=1, images=0, answer=1))),
    "empty": PackedBatch.empty(),
}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", BATCHES)
def test_shares_add_up_to_the_micro_batch(name: str, size: int) -> None:
    batch = BATCHES[name]
    shares = [share_of_rank(batch, rank, size) for rank in range(size)]
    assert torch.equal(torch.cat([share.label_rows for share in shares]).sort().values, batch.label_rows)
    for field in ("guidance_start", "guidance_end", "image_sample"):
        assert torch.equal(torch.cat([getattr(share, field) for share in shares]), getattr(batch, field))
    for field in ("pixel_values", "image_features"):
        whole = getattr(batch, field)
        parts = [part for share in shares if (part := getattr(share, field)) is not None]
        assert whole is None if not parts else torch.equal(torch.cat(parts), whole)
    for rank, share in enumerate(shares):
        assert share.num_images == share.context.image_counts[rank]
        assert (share.pixel_values is None) or share.pixel_values.shape[0] == share.num_images
        assert share.context.rows.size == size
        assert (share.context.rows.owner(share.label_rows) == rank).all()
        assert share.input_ids is batch.input_ids
        assert share.to("cpu").context == share.context
    counts = [share.num_images for share in shares]
    assert max(counts) - min(counts) <= 1


def test_rows_are_a_multiple_of_what_sequence_parallelism_cuts() -> None:
    assert share_of_rank(BATCHES["mixed"], 0, 2, multiple_of=4).context.rows.local_rows % 4 == 0
