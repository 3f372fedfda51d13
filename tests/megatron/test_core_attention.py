"""Packed attention against a loop over samples in float64, and the core attention module."""

from __future__ import annotations

import math

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from parrot_sys.errors import ConfigError
from parrot_sys.megatron.attention.context import make_context
from parrot_sys.megatron.attention.core import CoreAttention
from parrot_sys.megatron.attention.packed import plan_segments, planned_attention
from parrot_sys.modules.rotary import rotary_cos_sin, rotate

D = 8


def _loop(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], causal: bool) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V of each sample, written out."""
    repeat = query.shape[1] // key.shape[1]
    outputs, start = [query[:0]], 0
    for length in lengths:
        rows = slice(start, start + length)
        q, k, v = (x[rows].transpose(0, 1) for x in (query, *(x.repeat_interleave(repeat, 1) for x in (key, value))))
        scores = q @ k.transpose(1, 2) / math.sqrt(D)
        if causal:
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
        start += length
    return torch.cat(outputs)


def _rows(num_rows: int, heads: int, generator: torch.Generator) -> Tensor:
    return torch.randn(num_rows, heads, D, generator=generator, requires_grad=True)


LENGTHS = {
    "one": [7],
    "single-rows": [1, 1, 1],
    "equal": [6, 6, 6],
    "prime": [13, 2, 7, 31, 3],  # several groups, order changes
    "sorted": [2, 3, 5, 8],  # padded within groups, order kept
    "empty-samples": [4, 0, 9, 0],
    "none": [],
    "no-rows": [0, 0],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
def test_packed_equals_loop(lengths: list[int], causal: bool, heads: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(len(lengths) + heads)
    rows = sum(lengths)
    tensors = [_rows(rows, n, generator) for n in (heads, groups, groups)]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    plan = plan_segments(torch.tensor([0, *lengths]).cumsum(0).int())
    output = planned_attention(*tensors, plan, scale=1 / math.sqrt(D), causal=causal)
    wanted = _loop(*exact, lengths, causal)
    assert output.shape == wanted.shape
    gradient = torch.randn(rows, heads, D, generator=generator)
    output.backward(gradient)
    wanted.backward(gradient.double())
    torch.testing.assert_close(output.double(), wanted, rtol=1e-5, atol=1e-6)
    if rows:
        for got, reference in zip(tensors, exact, strict=True):
            torch.testing.assert_close(got.grad.double(), reference.grad, rtol=1e-5, atol=2e-6)


def test_memory_follows_the_samples_not_the_pack() -> None:
    plan = plan_segments(torch.tensor([0, *[5] * 400, 700]).cumsum(0).int())
    assert [(g.num_samples, g.length) for g in plan.groups] == [(400, 5), (1, 700)]
    uneven = plan_segments(torch.tensor([0, *range(1, 65)]).cumsum(0).int())
    padded = sum(g.num_samples * g.length for g in uneven.groups)
    assert len(uneven.groups) == 7
    assert padded < 2 * sum(range(1, 65))


def test_padding_does_not_leak_values_or_gradients() -> None:
    """Huge rows of one sample must not reach another one through the padding."""
    query, key, value = (torch.randn(8, 2, D, requires_grad=True) for _ in range(3))
    with torch.no_grad():
        value[0] = 1e30
    plan = plan_segments(torch.tensor([0, 5, 8]).int())
    output = planned_attention(query, key, value, plan, scale=0.3, causal=False)
    assert output[5:].abs().max() < 1e3
    output[5:].sum().backward()
    assert not value.grad[:5].any()
    assert not query.grad[:5].any()


def test_rotation_is_the_complex_product() -> None:
    rows, positions, base = torch.randn(5, 3, D), torch.tensor([0, 1, 2, 0, 1000]), 10_000.0
    cos, sin = rotary_cos_sin(positions, D, base, torch.float32)
    pairs = torch.complex(*rows.double().chunk(2, -1))
    angles = positions.double()[:, None, None] * base ** (-torch.arange(0, D, 2).double() / D)
    wanted = pairs * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(
        rotate(rows, cos, sin).double(), torch.cat([wanted.real, wanted.imag], -1), rtol=0, atol=2e-4
    )
    assert torch.equal(rotate(rows, cos, sin)[0], rows[0])


def _module(mask: AttnMaskType, **options: object) -> CoreAttention:
    config = TransformerConfig(
        num_layers=1, hidden_size=4 * D, num_attention_heads=4, num_query_groups=2, attention_dropout=0.0, **options
    )
    return CoreAttention(config, layer_number=1, attn_mask_type=mask)


@pytest.mark.parametrize("mask", [AttnMaskType.causal, AttnMaskType.no_mask])
def test_module_takes_dense_batches_and_packs(mask: AttnMaskType) -> None:
    module, causal = _module(mask), mask == AttnMaskType.causal
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(5, 3, n, D, generator=generator) for n in (4, 2, 2))  # [s, b, n, d]
    dense = module(query, key, value)
    assert dense.shape == (5, 3, 4 * D)
    packed = [x.transpose(0, 1).flatten(0, 1) for x in (query, key, value)]
    torch.testing.assert_close(
        dense.transpose(0, 1).reshape(15, 4, D), _loop(*packed, [5, 5, 5], causal), rtol=1e-5, atol=1e-6
    )
    context = make_context(torch.tensor([0, 5, 10, 15]).int(), 5, dtype=torch.float32)
    one_pack = module(*(x.unsqueeze(1) for x in packed), packed_seq_params=context)
    torch.testing.assert_close(one_pack.view(3, 5, -1).transpose(0, 1), dense, rtol=1e-5, atol=1e-6)


def test_what_it_cannot_do_is_an_error() -> None:
    rows = torch.zeros(2, 1, 4, D)
    with pytest.raises(ConfigError, match="no attention_mask"):
        _module(AttnMaskType.causal)(rows, rows, rows, attention_mask=torch.ones(1))
    with pytest.raises(ConfigError, match="needs causal attention, got no_mask with context_parallel_size=2"):
        _module(AttnMaskType.no_mask, context_parallel_size=2)
    with pytest.raises(ConfigError, match="give make_context"):
        _module(AttnMaskType.causal, context_parallel_size=2)(rows, rows, rows)
