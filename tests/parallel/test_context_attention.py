"""Attention over rows on 2 to 4 ranks against each sample alone in float64: outputs and all gradients."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parrot_sys.parallel import RowSplit, context_attention, share_pack
from parrot_sys.testing.distributed import run_distributed

WIDTH = 8
PACKS = {
    "ragged": [37, 5, 1, 64, 2],
    "one": [50],
    "shorter than the ranks": [1, 2, 1],
    "single row": [1],
    "empty samples": [0, 9, 0, 3, 0],
    "empty": [],
    "several rounds": [1500, 3, 700, 41],
}


def _inputs(num_rows: int, heads: int, groups: int) -> list[Tensor]:
    """Query, key, value and the gradient of the output."""
    generator = torch.Generator().manual_seed(num_rows + heads)
    return [torch.randn(num_rows, n, WIDTH, generator=generator) for n in (heads, groups, groups, heads)]


def _alone(lengths: list[int], heads: int, groups: int) -> list[Tensor]:
    """softmax(Q K^T / sqrt(d)) V of each sample, written out, and the gradients of Q, K and V."""
    *inputs, gradient = (rows.double() for rows in _inputs(sum(lengths), heads, groups))
    inputs = [rows.requires_grad_() for rows in inputs]
    query, key, value = inputs[0], *(rows.repeat_interleave(heads // groups, 1) for rows in inputs[1:])
    outputs = [query[:0]]
    for start, end in pairwise(torch.tensor([0, *lengths]).cumsum(0).tolist()):
        q, k, v = (rows[start:end].transpose(0, 1) for rows in (query, key, value))
        unseen = torch.ones(end - start, end - start).triu(1).bool()
        scores = (q @ k.transpose(1, 2) / math.sqrt(WIDTH)).masked_fill(unseen, float("-inf"))
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    output = torch.cat(outputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, gradient, materialize_grads=True)]


def _on_rank(rank: int, size: int, heads: int, groups: int, dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """This rank's output and gradients for each pack."""
    results = {}
    for name, lengths in PACKS.items():
        split = RowSplit.of(sum(lengths), size, multiple_of=2)
        *inputs, gradient = (split.take(split.pad(rows), rank) for rows in _inputs(sum(lengths), heads, groups))
        inputs = [rows.to(dtype).requires_grad_() for rows in inputs]
        cu_seqlens = torch.tensor([0, *lengths, split.padding]).cumsum(0).int()
        pack = share_pack(split, dist.group.WORLD, cu_seqlens)
        output = context_attention(*inputs, pack, scale=1 / math.sqrt(WIDTH))
        output.backward(gradient.to(dtype))
        results[name] = [output.detach(), *(rows.grad for rows in inputs)]
    return results


@pytest.mark.parametrize(
    ("size", "heads", "groups", "dtype"),
    [
        (2, 4, 2, torch.float64),
        (4, 6, 1, torch.float64),
        (3, 2, 2, torch.float32),
        (2, 4, 2, torch.bfloat16),
    ],
)
def test_rows_on_ranks_equal_each_sample_alone(size: int, heads: int, groups: int, dtype: torch.dtype) -> None:
    results = run_distributed(_on_rank, size, heads, groups, dtype)
    # bfloat16: inputs and outputs are rounded, and so are the key gradients that the ranks add up.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: (3 + size) * 2**-8}[dtype]
    for name, lengths in PACKS.items():
        split = RowSplit.of(sum(lengths), size, multiple_of=2)
        for got, wanted in zip(
            zip(*(result[name] for result in results), strict=True), _alone(lengths, heads, groups), strict=True
        ):
            whole = split.join(torch.cat(got)).double()
            assert not whole[sum(lengths) :].any(), "padding gets zeros and gives none"
            error = (whole[: sum(lengths)] - wanted).abs()
            assert error.numel() == 0 or error.max() <= tolerance * wanted.abs().max(), name


def test_frozen_keys_send_no_gradients() -> None:
    def on_rank(rank: int, size: int) -> bool:
        split = RowSplit.of(8, size)
        pack = share_pack(split, dist.group.WORLD, torch.tensor([0, 8]).int())
        query, key = torch.randn(4, 2, WIDTH, requires_grad=True), torch.randn(4, 2, WIDTH)
        context_attention(query, key, key, pack, scale=0.3).sum().backward()
        return query.grad is not None and bool(query.grad.isfinite().all())

    assert all(run_distributed(on_rank, 2))
