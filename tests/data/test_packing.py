"""Packed batches against a plain rewrite of the released splicing, and plans against what they promise."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from parrot_kernels.host import first_fit_decreasing
from parrot_sys.data.batch import PackedBatch
from parrot_sys.data.constants import IGNORE_ID, IMAGE_TOKEN_ID
from parrot_sys.data.packing import Sample, expanded_lengths, pack_samples, plan_micro_batches
from parrot_sys.errors import DataError


def plain_rows(sample, num_visual_rows, max_seq_len):
    """One row after the other: (id, label, None or (image, row of the image))."""
    rows, image = [], 0
    for token, label in list(zip(sample.input_ids, sample.labels, strict=True))[:max_seq_len]:
        if token == IMAGE_TOKEN_ID:
            rows += [(token, IGNORE_ID, (image, row)) for row in range(num_visual_rows)]
            image += 1
        else:
            rows.append((token, label, None))
    return rows[:max_seq_len]


def check_against_plain_rows(batch, samples, num_visual_rows, guidance, max_seq_len):
    start = guide = first_image = 0
    visual, labelled, pixels = [], [], []
    for number, sample in enumerate(samples):
        rows = plain_rows(sample, num_visual_rows, max_seq_len)
        assert batch.cu_seqlens[number] == start
        for t, (token, _, place) in enumerate(rows):
            assert batch.input_ids[start + t] == token
            assert batch.position_ids[start + t] == t
            target = rows[t + 1][1] if t + 1 < len(rows) else IGNORE_ID
            assert batch.labels[start + t] == target
            if target != IGNORE_ID:
                labelled.append(start + t)
            if place is not None:
                visual.append((start + t, (first_image + place[0]) * num_visual_rows + place[1]))
        images = 1 + max((place[0] for *_, place in rows if place is not None), default=-1)
        answers = [t for t, (_, label, _) in enumerate(rows) if label != IGNORE_ID]
        end = answers[0] if guidance == "first_turn" and answers else len(rows)
        guides = [start + t for t, (_, label, place) in enumerate(rows[:end]) if label == IGNORE_ID and place is None]
        for image in range(first_image, first_image + images):
            span = slice(batch.guidance_start[image], batch.guidance_end[image])
            assert batch.guidance_rows[span].tolist() == guides
            assert batch.image_sample[image] == number
        pixels += list(sample.pixel_values[:images]) if images else []
        guide += len(guides) if images else 0
        start += len(rows)
        first_image += images
    assert batch.cu_seqlens[-1] == start == batch.num_rows
    assert list(zip(batch.visual_rows.tolist(), batch.visual_source.tolist(), strict=True)) == visual
    assert batch.label_rows.tolist() == labelled
    assert batch.guidance_rows.numel() == guide
    assert batch.num_images == first_image
    assert batch.max_seqlen == max(np.diff(batch.cu_seqlens.numpy()))
    assert (batch.pixel_values is None) == (first_image == 0)
    if first_image:
        assert torch.equal(batch.pixel_values, torch.stack(pixels))


@st.composite
def random_samples(draw):
    """Text, images and labels in any order; labels also on no row or on every text row."""
    rows = st.tuples(st.integers(0, 9), st.booleans())
    samples = []
    for _ in range(draw(st.integers(1, 4))):
        content = draw(st.lists(st.one_of(rows, st.just(None)), min_size=1, max_size=8))
        ids = [IMAGE_TOKEN_ID if row is None else row[0] for row in content]
        labels = [row[0] if row is not None and row[1] else IGNORE_ID for row in content]
        count = ids.count(IMAGE_TOKEN_ID)
        pixels = torch.rand(count, 3, 2, 2) if count else None
        samples.append(Sample(input_ids=ids, labels=labels, pixel_values=pixels))
    return samples


@settings(max_examples=200, deadline=None)
@given(
    samples=random_samples(),
    num_visual_rows=st.integers(1, 5),
    guidance=st.sampled_from(["prompt", "first_turn"]),
    max_seq_len=st.one_of(st.none(), st.integers(1, 20)),
)
def test_packed_batch_equals_plain_rows(samples, num_visual_rows, guidance, max_seq_len):
    batch = pack_samples(samples, num_visual_rows=num_visual_rows, guidance=guidance, max_seq_len=max_seq_len)
    check_against_plain_rows(batch, samples, num_visual_rows, guidance, max_seq_len)
    for sample, length in zip(samples, batch.cu_seqlens.diff().tolist(), strict=True):
        ids = np.array(sample.input_ids)
        rows, full = expanded_lengths(ids, num_visual_rows, max_seq_len or 10**6)
        assert rows == length
        assert full == len(plain_rows(sample, num_visual_rows, None))


def test_guidance_rows_are_the_text_that_guided_the_released_model(parrot_tiny, expected, processor):
    tensors = load_file(parrot_tiny / "expected.safetensors")
    with safe_open(parrot_tiny / "model" / "model.safetensors", "pt") as weights:
        embeddings = weights.get_tensor("model.embed_tokens.weight")
    for number, case in enumerate(expected["batches"]):
        samples = []
        for index in case["indices"]:
            conversation = expected["conversations"][index]
            image = conversation["source"]["image"]
            pixels = None if image is None else tensors["pixel_values"][image : image + 1]
            samples.append(
                Sample(input_ids=conversation["input_ids"], labels=conversation["labels"], pixel_values=pixels)
            )
        batch = pack_samples(samples, num_visual_rows=17)
        lengths = tensors[f"batch{number}.logits"].shape[1]
        assert batch.max_seqlen == lengths
        with_image = [i for i, sample in enumerate(samples) if sample.pixel_values is not None]
        assert batch.image_sample.tolist() == with_image
        for image, sample in enumerate(with_image):
            guides = batch.guidance_rows[batch.guidance_start[image] : batch.guidance_end[image]]
            wanted = tensors[f"batch{number}.moe{sample}.text_embeds"]
            assert torch.equal(embeddings[batch.input_ids[guides]], wanted)


def test_dtypes_and_contents_of_a_small_batch():
    samples = [
        Sample(
            input_ids=[5, IMAGE_TOKEN_ID, 6, 7, 8],
            labels=[IGNORE_ID, IGNORE_ID, IGNORE_ID, 7, 8],
            image_features=torch.ones(1, 2, 4),
            language="pt",
            record_id="a:1",
        ),
        Sample(input_ids=torch.tensor([1, 2]), labels=torch.tensor([IGNORE_ID, 2])),
    ]
    batch = pack_samples(samples, num_visual_rows=2)
    wanted = {
        "input_ids": [5, -200, -200, 6, 7, 8, 1, 2],
        "labels": [-100, -100, -100, 7, 8, -100, 2, -100],
        "label_rows": [3, 4, 6],
        "position_ids": [0, 1, 2, 3, 4, 5, 0, 1],
        "cu_seqlens": [0, 6, 8],
        "visual_rows": [1, 2],
        "visual_source": [0, 1],
        "guidance_rows": [0, 3],
        "guidance_start": [0],
        "guidance_end": [2],
        "image_sample": [0],
    }
    int32 = {"cu_seqlens", "guidance_start", "guidance_end"}
    for name, values in wanted.items():
        tensor = getattr(batch, name)
        assert tensor.tolist() == values, name
        assert tensor.dtype == (torch.int32 if name in int32 else torch.int64), name
    assert (batch.max_seqlen, batch.num_samples, batch.num_images, batch.num_rows) == (6, 2, 1, 8)
    assert batch.pixel_values is None
    assert torch.equal(batch.image_features, torch.ones(1, 2, 4))
    assert (batch.languages, batch.record_ids) == (("pt", ""), ("a:1", ""))


def test_no_samples_give_the_empty_batch():
    batch, empty = pack_samples([], num_visual_rows=3), PackedBatch.empty()
    for field in dataclasses.fields(PackedBatch):
        ours, theirs = getattr(batch, field.name), getattr(empty, field.name)
        if isinstance(ours, torch.Tensor):
            assert torch.equal(ours, theirs)
            assert ours.dtype == theirs.dtype
        else:
            assert ours == theirs
    assert (empty.num_samples, empty.num_images, empty.num_rows) == (0, 0, 0)


def test_without_labels_all_text_guides_and_nothing_bears_loss():
    sample = Sample(input_ids=[5, IMAGE_TOKEN_ID, 6], pixel_values=torch.zeros(1, 3, 2, 2))
    for guidance in ("prompt", "first_turn"):
        batch = pack_samples([sample], num_visual_rows=4, guidance=guidance)
        assert batch.guidance_rows.tolist() == [0, 5]
        assert batch.label_rows.numel() == 0


def test_first_answer_ends_the_guidance_of_the_first_turn():
    pixels = torch.zeros(1, 3, 2, 2)
    sample = Sample(input_ids=[5, IMAGE_TOKEN_ID, 6, 7, 8], first_answer=3, pixel_values=pixels)
    rows = {g: pack_samples([sample], num_visual_rows=4, guidance=g).guidance_rows for g in ("prompt", "first_turn")}
    assert rows["first_turn"].tolist() == [0, 5]
    assert rows["prompt"].tolist() == [0, 5, 6, 7]


def test_to_moves_every_tensor():
    batch = pack_samples([Sample(input_ids=[IMAGE_TOKEN_ID], pixel_values=torch.zeros(1, 3, 2, 2))], num_visual_rows=1)
    moved = batch.to("meta")
    tensors = [getattr(moved, field.name) for field in dataclasses.fields(moved)]
    assert {t.device.type for t in tensors if isinstance(t, torch.Tensor)} == {"meta"}


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([Sample(input_ids=[], record_id="x:3")], "'x:3' must have ids and as many labels, got \\[0\\] ids"),
        ([Sample(input_ids=[1], labels=[1, 2])], "got \\[1\\] ids and \\[2\\] labels"),
        ([Sample(input_ids=[IMAGE_TOKEN_ID])], "one image for each of its 1 markers, got 0"),
        ([Sample(input_ids=[1], pixel_values=torch.zeros(1, 3, 2, 2))], "each of its 0 markers, got 1"),
        (
            [Sample(input_ids=[IMAGE_TOKEN_ID], image_features=torch.zeros(1, 3, 4))],
            "must be \\[1, 2, C\\], got \\[1, 3, 4\\]",
        ),
        (
            [
                Sample(
                    input_ids=[IMAGE_TOKEN_ID],
                    image_features=torch.zeros(1, 2, 4),
                    pixel_values=torch.zeros(1, 3, 2, 2),
                )
            ],
            "got both$",
        ),
        (
            [
                Sample(input_ids=[IMAGE_TOKEN_ID], image_features=torch.zeros(1, 2, 4)),
                Sample(input_ids=[IMAGE_TOKEN_ID], pixel_values=torch.zeros(1, 3, 2, 2)),
            ],
            "got both kinds",
        ),
    ],
)
def test_wrong_samples_are_errors(samples, message):
    with pytest.raises(DataError, match=message):
        pack_samples(samples, num_visual_rows=2)


def plain_first_fit_decreasing(lengths, capacity):
    bins = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for each in bins:
            if sum(lengths[i] for i in each) + lengths[index] <= capacity:
                each.append(index)
                break
        else:
            bins.append([index])
    return bins


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), max_size=60), capacity=st.integers(30, 80))
def test_first_fit_decreasing_equals_plain_python(lengths, capacity):
    assert first_fit_decreasing(np.array(lengths, dtype=np.int64), capacity) == plain_first_fit_decreasing(
        lengths, capacity
    )


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), max_size=60),
    capacity=st.integers(30, 80),
    dp_size=st.integers(1, 5),
)
def test_plans_hold_every_sample_once_within_capacity_and_no_more_bins_than_needed(lengths, capacity, dp_size):
    plan = plan_micro_batches(lengths, capacity, dp_size)
    assert len(plan) == dp_size
    assert sorted(i for rank in plan for each in rank for i in each) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in each) <= capacity for rank in plan for each in rank)
    needed = max(1, -(-len(plain_first_fit_decreasing(lengths, capacity)) // dp_size))
    assert {len(rank) for rank in plan} == {needed}


def test_small_samples_are_spread_over_the_ranks():
    plan = plan_micro_batches([10] * 8, 1000, 4)
    assert [[len(each) for each in rank] for rank in plan] == [[2]] * 4


def test_ranks_get_about_as_many_rows():
    lengths = np.random.default_rng(0).integers(20, 700, 128)
    plan = plan_micro_batches(lengths, 4096, 4)
    rows = [sum(int(lengths[i]) for each in rank for i in each) for rank in plan]
    assert max(rows) <= 1.05 * min(rows)


def test_a_sample_longer_than_the_capacity_is_an_error():
    with pytest.raises(ValueError, match=r"lengths\[1\] must be in \[0, capacity=5\], got 9"):
        plan_micro_batches([3, 9], 5, 1)
