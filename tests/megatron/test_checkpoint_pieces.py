"""Large tensors of a checkpoint, read some rows at a time, are those that `torch.load` reads."""

from __future__ import annotations

import io
import math
from pathlib import Path
from unittest import mock

import torch
from hypothesis import given
from hypothesis import strategies as st

from parrot_sys.megatron.checkpoint import pieces
from parrot_sys.megatron.checkpoint.pieces import find_tensor


@given(data=st.data())
def test_any_part_is_the_one_torch_reads(data: st.DataObject) -> None:
    size = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4), label="size")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]), label="dtype")
    asked = data.draw(st.sampled_from([torch.float32, torch.bfloat16]), label="asked")
    front = data.draw(st.binary(max_size=20), label="front")
    most = data.draw(st.integers(1, 64), label="bytes in memory at once")
    offsets = [data.draw(st.integers(0, length - 1)) for length in size]
    lengths = [data.draw(st.integers(1, length - at)) for length, at in zip(size, offsets, strict=True)]
    saved = torch.randn(math.prod(size) + 2, dtype=torch.float64).to(dtype)[2:].view(size)
    stored = io.BytesIO()
    torch.save(saved, stored)
    file = io.BytesIO(front + stored.getvalue() + front)
    found = find_tensor(file, len(front), len(stored.getvalue()))
    assert found is not None
    target = torch.zeros(lengths, dtype=asked)
    with mock.patch.object(pieces, "PIECE_BYTES", most):
        found.copy_into(target, file, offsets, lengths)
    wanted = saved[tuple(slice(at, at + length) for at, length in zip(offsets, lengths, strict=True))]
    assert torch.equal(target, wanted.to(asked))


def test_what_is_no_dense_tensor_is_left_to_torch(tmp_path: Path) -> None:
    made = tmp_path / "made"

    class Hostile:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (made,))

    dense = torch.ones(3, 4)
    for other in (dense.T, dense.expand(2, 3, 4), torch.ones(3, dtype=torch.int64), [dense], {"a": 1}, Hostile()):
        file = io.BytesIO()
        torch.save(other, file)
        assert find_tensor(file, 0, len(file.getvalue())) is None
    file = io.BytesIO()
    torch.save(dense, file)
    for length in range(0, len(file.getvalue()), 16):
        assert find_tensor(file, 0, length) is None, "a damaged one"
    assert not made.exists()
