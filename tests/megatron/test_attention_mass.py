"""Attention before and after the image: against counting, against the whole matrix, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import parrot_sys
from parrot_sys.data.batch import PackedBatch
from parrot_sys.data.constants import IMAGE_TOKEN_ID
from parrot_sys.data.packing import Sample, pack_samples
from parrot_sys.errors import DataError
from parrot_sys.megatron.attention_mass import AFTER, BEFORE, IMAGE, attention_mass, row_kinds
from parrot_sys.megatron.model import MultimodalModel
from parrot_sys.megatron.runtime.initialize import shutdown
from parrot_sys.modules.rotary import rotate

CHECKPOINT = Path(__file__).parents[1] / "fixtures" / "parrot_tiny" / "model"
TOLERANCE = 1e-5  # float32 sums of at most a hundred weights


@pytest.fixture(scope="module")
def model() -> Iterator[MultimodalModel]:
    yield parrot_sys.load_pretrained(CHECKPOINT)[0].model
    shutdown()


def _pack(model: MultimodalModel, *samples: list[int]) -> PackedBatch:
    vision = model.bridge.vision
    generator = torch.Generator().manual_seed(0)
    packed = [
        Sample(
            input_ids=torch.tensor(ids),
            image_features=torch.randn(
                ids.count(IMAGE_TOKEN_ID), vision.num_visual_rows, vision.hidden_size, generator=generator
            )
            if IMAGE_TOKEN_ID in ids
            else None,
        )
        for ids in samples
    ]
    return pack_samples(packed, num_visual_rows=vision.num_visual_rows)


def _two_samples(model: MultimodalModel) -> PackedBatch:
    return _pack(model, [5, 6, 7, IMAGE_TOKEN_ID, 8, 9], [IMAGE_TOKEN_ID, 3, 4, 5, 6])


def test_kinds_of_rows(model: MultimodalModel) -> None:
    visual = model.bridge.vision.num_visual_rows
    batch = _pack(model, [5, IMAGE_TOKEN_ID, 6, IMAGE_TOKEN_ID, 7], [8, 9, IMAGE_TOKEN_ID, 3])
    image = [IMAGE] * visual
    wanted = [BEFORE, *image, AFTER, *image, AFTER, BEFORE, BEFORE, *image, AFTER]
    assert row_kinds(batch).tolist() == wanted
    with pytest.raises(DataError, match="text alone"):
        row_kinds(_pack(model, [5, IMAGE_TOKEN_ID, 6], [7, 8]))


@torch.no_grad()
def test_equal_weights_are_counted(model: MultimodalModel) -> None:
    """With queries of zero a row gives every row up to itself the same weight."""
    batch = _two_samples(model)
    visual = model.bridge.vision.num_visual_rows
    projections = [layer.self_attention.linear_qkv for layer in model.decoder.layers]
    held = [{name: p.clone() for name, p in module.named_parameters()} for module in projections]
    try:
        for module in projections:
            for parameter in module.parameters():
                parameter.zero_()
        with attention_mass(model, row_kinds(batch)) as layers:
            model(batch, mode="logits")
    finally:
        for module, values in zip(projections, held, strict=True):
            for name, parameter in module.named_parameters():
                parameter.copy_(values[name])
    wanted = []
    for before, after in ((3, 2), (0, 4)):
        rows = [torch.tensor([before, visual, i]) / (before + visual + i) for i in range(1, after + 1)]
        wanted.append(torch.stack(rows).mean(0))
    assert len(layers) == model.bridge.llm.num_layers
    for mass in layers:
        torch.testing.assert_close(mass, torch.stack(wanted), rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_shares_are_those_of_the_matrix_of_weights(model: MultimodalModel) -> None:
    batch = _two_samples(model)
    kinds = row_kinds(batch)
    wanted: list[Tensor] = []

    def watch(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        context = kwargs["packed_seq_params"]
        query, key = (rotate(rows.squeeze(1), *context.rotary) for rows in args[:2])
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        shares = []
        for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
            scores = torch.einsum("ind,jnd->nij", query[start:end], key[start:end]).double() * module.scale
            hidden = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).mean(0)
            of = kinds[start:end]
            rows = weights[of == AFTER]
            shares.append(torch.stack([rows[:, of == kind].sum(-1).mean() for kind in (BEFORE, IMAGE, AFTER)]))
        wanted.append(torch.stack(shares))

    handles = [
        layer.self_attention.core_attention.register_forward_pre_hook(watch, with_kwargs=True)
        for layer in model.decoder.layers
    ]
    try:
        with attention_mass(model, kinds) as layers:
            model(batch, mode="logits")
    finally:
        for handle in handles:
            handle.remove()
    for mass, share in zip(layers, wanted, strict=True):
        torch.testing.assert_close(mass.double(), share, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_nothing_is_collected_behind_the_block(model: MultimodalModel) -> None:
    batch = _two_samples(model)
    with attention_mass(model, row_kinds(batch)) as layers:
        pass
    model(batch, mode="logits")
    assert layers == []
