"""Gated blocks over packed samples against the released block with its dense mask, under both media rules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parrot_sys.errors import ConfigError
from parrot_sys.modules.gated_cross_attention import (
    GatedCrossAttention,
    GatedCrossAttentionConfig,
    MediaRule,
    media_spans,
)
from parrot_sys.systems.multimodal_gpt.maps import block_maps
from tests.models.flamingo_reference import ReleasedBlock

IMAGE = 9
CONFIG = GatedCrossAttentionConfig(num_attention_heads=3, head_dim=5, ffn_multiplier=2)
HIDDEN, MEDIA, LATENTS = 12, 7, 4
SAMPLES = [
    [1, 2, IMAGE, 3, 4],
    [IMAGE, 1, 1, IMAGE, 2, IMAGE],
    [5, 6, 7],
    [IMAGE],
    [1, 2, IMAGE],
]
"""One image, three, none, nothing but an image, an image at the end."""


def packed(samples: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [T], image rows [n], sample boundaries [S + 1]."""
    ids = torch.tensor([token for sample in samples for token in sample])
    bounds = torch.tensor([0, *(len(sample) for sample in samples)]).cumsum(0).int()
    return ids, (ids == IMAGE).nonzero()[:, 0], bounds


@pytest.mark.parametrize("rule", ["previous", "next"])
def test_matches_released_block(rule: MediaRule) -> None:
    reference, block = (
        ReleasedBlock(HIDDEN, MEDIA, 3, 5, 2).double(),
        GatedCrossAttention(CONFIG, HIDDEN, MEDIA).double(),
    )
    state = dict(reference.named_parameters())
    maps = block_maps(CONFIG, HIDDEN, MEDIA, "", "")
    block.load_state_dict({e.name[1:]: e.pack([state[key[1:]] for key in e.keys]).detach() for e in maps})
    ids, media_rows, bounds = packed(SAMPLES)
    hidden = torch.randn(len(ids), HIDDEN, dtype=torch.float64, requires_grad=True)
    latents = torch.randn(len(media_rows), LATENTS, MEDIA, dtype=torch.float64, requires_grad=True)
    factor = torch.randn_like(hidden)

    counts = [sample.count(IMAGE) for sample in SAMPLES]
    parts = zip(hidden.split([len(s) for s in SAMPLES]), latents.split(counts), SAMPLES, strict=True)
    wanted = torch.cat(
        [
            reference(x, media, torch.tensor(s) == IMAGE, rule == "previous") if len(media) else x
            for x, media, s in parts
        ]
    )
    (wanted * factor).sum().backward()
    gradients = [hidden.grad, latents.grad]
    hidden.grad = latents.grad = None

    spans = media_spans(media_rows, bounds, len(ids), LATENTS, rule)
    output = block(hidden, *block.attention.keys_values(latents.flatten(0, 1)), spans, spans.active)
    (output * factor).sum().backward()
    torch.testing.assert_close(output, wanted)
    torch.testing.assert_close([hidden.grad, latents.grad], gradients)
    for entry in maps:
        theirs = [state[key[1:]].grad for key in entry.keys]
        torch.testing.assert_close(entry.unpack(block.get_parameter(entry.name[1:]).grad), theirs, msg=entry.name)


@pytest.mark.parametrize(
    ("rule", "image"),
    [("previous", [-1, -1, 0, 0, 0, 1, 1, 1, 2, -1, 3]), ("next", [0, 0, 0, -1, -1, 1, 2, 2, 2, 3, 3])],
)
def test_which_image_each_row_reads(rule: MediaRule, image: list[int]) -> None:
    _, media_rows, bounds = packed([[1, 2, IMAGE, 3, 4], [IMAGE, 1, 2, IMAGE], [1, IMAGE]])
    spans = media_spans(media_rows, bounds, 11, LATENTS, rule)
    seen = [start // LATENTS if end > start else -1 for start, end in zip(spans.start, spans.end, strict=True)]
    assert [int(each) for each in seen] == image
    assert spans.active.all()


def test_packs_without_images_and_without_rows() -> None:
    _, media_rows, bounds = packed([[1, 2], [3]])
    spans = media_spans(media_rows, bounds, 3, LATENTS, "next")
    assert not spans.active.any()
    assert torch.equal(spans.start, spans.end)
    empty = media_spans(media_rows, bounds[:1], 0, LATENTS, "previous")
    assert empty.start.shape == (0,)


def test_new_block_changes_nothing_and_learns() -> None:
    block = GatedCrossAttention(CONFIG, HIDDEN, MEDIA)
    _, media_rows, bounds = packed([[1, IMAGE, 2]])
    spans = media_spans(media_rows, bounds, 3, LATENTS, "previous")
    hidden = torch.randn(3, HIDDEN)
    output = block(hidden, *block.attention.keys_values(torch.randn(LATENTS, MEDIA)), spans, spans.active)
    assert torch.equal(output, hidden)
    output.sum().backward()
    assert 0 < abs(block.attention_gate.grad.item()) < float("inf")


def test_passed_reaches_what_learns() -> None:
    block = GatedCrossAttention(CONFIG, HIDDEN, MEDIA)
    block.mlp.requires_grad_(False)
    hidden = torch.randn(3, HIDDEN, requires_grad=True)
    output = block.passed(hidden)
    assert torch.equal(output, hidden)
    output.sum().backward()
    assert all((p.grad is not None and not p.grad.any()) == p.requires_grad for p in block.parameters())
    assert torch.equal(hidden.grad, torch.ones_like(hidden))


def test_size_of_open_flamingo_9b() -> None:
    with torch.device("meta"):
        block = GatedCrossAttention(GatedCrossAttentionConfig(), 4096, 1024)
    assert sum(p.numel() for p in block.parameters()) == 139_476_994


def test_wrong_sizes() -> None:
    with pytest.raises(ConfigError, match=r"cross_attention\.head_dim must be >= 1, got 0"):
        GatedCrossAttentionConfig(head_dim=0)
