"""Guiding tokens and routes do not depend on how samples are batched: padded, packed, reordered, on which rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from parrot_sys.errors import DataError
from parrot_sys.megatron import add_text_guidance, packed_sample_ids, text_guidance
from parrot_sys.megatron.attention.context import make_context
from parrot_sys.megatron.attention.core import CoreAttention
from parrot_sys.megatron.runtime.initialize import ParallelConfig, initialize, shutdown
from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.testing.distributed import run_distributed
from tests.megatron.llava import IMAGE, make_llava

PAD, ROWS = 0, 5
"""The id that pads is text as well, as an end-of-text token is; rows of the decoder for each tile."""
MOE = TextGuidedMoEConfig(num_experts=3, ffn_hidden_size=10)


@dataclass(frozen=True)
class Sample:
    """Token ids with a marker an image, whether the next token is an answer, tiles of each image."""

    ids: tuple[int, ...]
    answer: tuple[int, ...]
    tiles: tuple[int, ...]

    def guiding(self) -> list[int]:
        """Ids that guide, written out one by one."""
        ends = [place for place, token in enumerate(self.ids) if token != PAD]
        return [
            token
            for place, token in enumerate(self.ids)
            if ends and ends[0] <= place <= ends[-1] and token != IMAGE and not (place and self.answer[place - 1])
        ]

    def rows(self) -> int:
        """Rows of the decoder once the images are in place."""
        return len(self.ids) - len(self.tiles) + ROWS * sum(self.tiles)


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    ids = draw(st.lists(st.sampled_from([IMAGE, PAD, *range(1, 9)]), min_size=1, max_size=9))
    answer = draw(st.lists(st.integers(0, 1), min_size=len(ids), max_size=len(ids)))
    tiles = draw(st.lists(st.integers(1, 3), min_size=ids.count(IMAGE), max_size=ids.count(IMAGE)))
    return Sample(tuple(ids), tuple(answer), tuple(tiles))


def _guiding_of_each_image(ids: Tensor, **arguments: Any) -> list[list[int]]:
    spans = text_guidance(ids, image_token_id=IMAGE, pad_token_id=PAD, **arguments)
    text = ids.flatten()[spans.rows]
    return [text[start:end].tolist() for start, end in zip(spans.start.tolist(), spans.end.tolist(), strict=True)]


def _wanted(batch: list[Sample]) -> list[list[int]]:
    return [sample.guiding() for sample in batch for _ in range(sum(sample.tiles))]


def _tiles(batch: list[Sample]) -> Tensor:
    return torch.tensor([tiles for sample in batch for tiles in sample.tiles], dtype=torch.int64)


@given(st.lists(samples(), min_size=1, max_size=4), st.integers(0, 5), st.randoms())
@settings(max_examples=150, deadline=None)
def test_padding_and_order_do_not_matter(batch: list[Sample], more: int, random: Any) -> None:
    random.shuffle(batch)
    length = max(len(sample.ids) for sample in batch) + more
    ids, mask = torch.full((len(batch), length), PAD), torch.zeros(len(batch), length)
    for row, sample in enumerate(batch):
        left = random.randint(0, length - len(sample.ids))
        ids[row, left : left + len(sample.ids)] = torch.tensor(sample.ids)
        mask[row, left : left + len(sample.ids)] = torch.tensor(sample.answer, dtype=torch.float32)
    assert _guiding_of_each_image(ids, loss_mask=mask, tiles=_tiles(batch)) == _wanted(batch)


@given(st.lists(samples(), min_size=1, max_size=5), st.integers(0, 4), st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_text_of_a_sample_guides_its_own_images_in_a_pack(batch: list[Sample], more: int, aligned: bool) -> None:
    # With `aligned` each sample is padded to a multiple of 4 rows, and cu_seqlens_q_padded says so.
    padding = [-sample.rows() % 4 if aligned else 0 for sample in batch]
    ids, answers = list[int](), list[int]()
    for sample, pad in zip(batch, padding, strict=True):
        ids += [*sample.ids, *[PAD] * pad]
        answers += [*sample.answer, *[1] * pad]
    lengths = torch.tensor([sample.rows() for sample in batch])
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    padded = torch.nn.functional.pad((lengths + torch.tensor(padding)).cumsum(0), (1, 0)).int()
    packs = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_q_padded=padded if aligned else None)
    packed = torch.tensor([ids + [PAD] * more])
    mask = torch.tensor([answers + [0] * more])
    tiles = _tiles(batch)
    numbers = packed_sample_ids(packed, packs, image_token_id=IMAGE, rows_per_image=ROWS, tiles=tiles)
    assert _guiding_of_each_image(packed, loss_mask=mask, sample_ids=numbers, tiles=tiles) == _wanted(batch)


def test_lengths_that_count_tokens_are_refused() -> None:
    ids = torch.tensor([[3, IMAGE, 4, 5, IMAGE, 6]])
    packs = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor([0, 3, 6], dtype=torch.int32))
    with pytest.raises(DataError, match=r"image 0 does not lie inside one sample .* rows of the decoder, 5 for each"):
        packed_sample_ids(ids, packs, image_token_id=IMAGE, rows_per_image=ROWS)
    assert packed_sample_ids(ids, packs, image_token_id=IMAGE, rows_per_image=1).tolist() == [[0, 0, 0, 1, 1, 1]]
    with pytest.raises(DataError, match=r"must end at 2 x 10 rows.* got 6: pack a batch into one row"):
        packed_sample_ids(ids.view(2, 3).repeat(1, 2), packs, image_token_id=IMAGE, rows_per_image=3)
    with pytest.raises(DataError, match="must ascend"):
        text_guidance(ids, image_token_id=IMAGE, sample_ids=torch.tensor([[1, 1, 1, 0, 0, 0]]))
    with pytest.raises(DataError, match="outside every sample"):
        text_guidance(ids, image_token_id=IMAGE, sample_ids=torch.tensor([[0, 0, 0, 1, -1, 1]]))


SAMPLES = (
    Sample((7, IMAGE, 3, 9, 12), (0, 0, 1, 1, 0), (1,)),
    Sample((IMAGE, 5, IMAGE, 8, 11, 10, 13), (0, 0, 0, 0, 1, 1, 0), (1, 1)),
    Sample((4, 6, IMAGE, 2), (0, 0, 0, 0), (1,)),
    Sample((9, 14, 15, IMAGE, 1, 3), (0, 0, 0, 0, 1, 0), (1,)),
)


def _pictures(indices: list[int]) -> Tensor:
    of_sample = [
        torch.randn(len(s.tiles), 3, 28, 28, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(SAMPLES)
    ]
    return torch.cat([of_sample[index] for index in indices])


def _padded(indices: list[int], more: int = 0) -> dict[str, Any]:
    length = max(len(SAMPLES[index].ids) for index in indices) + more
    ids, mask = torch.full((len(indices), length), PAD), torch.zeros(len(indices), length)
    for row, index in enumerate(indices):
        ids[row, : len(SAMPLES[index].ids)] = torch.tensor(SAMPLES[index].ids)
        mask[row, : len(SAMPLES[index].ids)] = torch.tensor(SAMPLES[index].answer, dtype=torch.float32)
    return {
        "images": _pictures(indices),
        "input_ids": ids,
        "position_ids": torch.arange(length).repeat(len(indices), 1),
        "attention_mask": None,
        "labels": ids.roll(-1, 1).clamp(min=0),
        "loss_mask": mask,
    }


def _packed(indices: list[int]) -> dict[str, Any]:
    """One pack; its context is one that Megatron's layers take without Transformer Engine."""
    ids = torch.tensor([[token for index in indices for token in SAMPLES[index].ids]])
    lengths = torch.tensor([SAMPLES[index].rows() for index in indices])
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    total = int(bounds[-1])  # positions run on through the pack, which rotation does not mind
    context = make_context(bounds, int(lengths.max()), dtype=torch.float32)
    labels = torch.cat([torch.tensor(SAMPLES[index].ids).roll(-1).clamp(min=0) for index in indices])
    return {
        "images": _pictures(indices),
        "input_ids": ids,
        "position_ids": torch.arange(ids.shape[1])[None],
        "attention_mask": None,
        "labels": labels[None],
        "loss_mask": torch.tensor([[float(answer) for index in indices for answer in SAMPLES[index].answer]]),
        "packed_seq_params": dataclasses.replace(context, cu_seqlens_q=bounds, max_seqlen_q=total, max_seqlen_kv=total),
    }


def _model(parallel: ParallelConfig | None = None, layers: int = 1, **options: Any) -> Any:
    spec = get_gpt_layer_local_spec()
    attention = spec.submodules.self_attention
    attention.submodules = dataclasses.replace(attention.submodules, core_attention=CoreAttention)
    model = make_llava(parallel, spec, layers=layers, **options)
    torch.manual_seed(4)
    add_text_guidance(model, MOE, pad_token_id=PAD)
    return model


def _loss_and_routes(model: Any, batch: dict[str, Any]) -> tuple[float, Tensor]:
    losses, mask = model(**batch)
    return ((losses * mask).sum() / mask.sum()).item(), model.text_guided.routing.probs.detach()


@pytest.fixture
def _groups() -> Iterator[None]:
    initialize()
    yield
    shutdown()


@pytest.mark.usefixtures("_groups")
def test_llava_model_routes_alike_however_it_is_batched() -> None:
    model, everything = _model(), [0, 1, 2, 3]
    loss, routes = _loss_and_routes(model, _padded(everything))
    assert (routes - routes.mean(0)).abs().max() > 1e-3, "routes must differ for the comparison to say anything"
    assert loss == pytest.approx(_loss_and_routes(model, _padded(everything, more=7))[0], rel=1e-5)
    packed_loss, packed_routes = _loss_and_routes(model, _packed(everything))
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    first_image = np.cumsum([0, *(len(sample.tiles) for sample in SAMPLES)])
    for batch in (_padded([2, 0, 3, 1], more=3), _packed([2, 0, 3, 1])):
        images = [image for index in (2, 0, 3, 1) for image in range(first_image[index], first_image[index + 1])]
        assert (_loss_and_routes(model, batch)[1] - routes[images]).abs().max() < 1e-6
    for index, sample in enumerate(SAMPLES):
        alone = _loss_and_routes(model, _padded([index]))[1]
        assert (alone - routes[first_image[index] : first_image[index] + len(sample.tiles)]).abs().max() < 1e-6
    assert (packed_routes - routes).abs().max() < 1e-6


def _whole(rank: int, size: int) -> tuple[float, Tensor, dict[str, Tensor]]:
    initialize()
    model = _model(layers=2)
    state = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    return *_loss_and_routes(model, _padded([0, 1, 2, 3])), state


def _second_stage_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the whole model's weights, those of its second layer as the first one of a stage."""
    other = {key: value for key, value in state.items() if ".decoder.layers." not in key}
    moved = {
        key.replace(".decoder.layers.1.", ".decoder.layers.0."): v for key, v in state.items() if ".layers.1." in key
    }
    return {**other, **moved}


def _two_stages(rank: int, size: int, state: dict[str, Tensor]) -> tuple[float, Tensor] | None:
    parallel = ParallelConfig(pipeline_model_parallel_size=2)
    initialize(parallel)
    first = parallel_state.is_pipeline_first_stage()
    model = _model(parallel, layers=2, pre_process=first, post_process=not first)
    own = state if first else _second_stage_keys(state)
    own = {key: value for key, value in own.items() if key in model.state_dict()}
    model.load_state_dict(own, strict=False)
    # Both stages have the projection here; only the first one embeds text.
    assert hasattr(model, "text_guided") == first
    batch = _padded([0, 1, 2, 3])
    if first:
        hidden, _ = model(**batch)
        torch.distributed.send(hidden.detach().contiguous(), 1)
        return 0.0, model.text_guided.routing.probs.detach()
    hidden = torch.empty(64, 4, 16)
    torch.distributed.recv(hidden, 0)
    model.language_model.set_input_tensor(hidden)
    losses, mask = model(**batch)
    return ((losses * mask).sum() / mask.sum()).item(), torch.empty(0)


def _two_replicas(rank: int, size: int, state: dict[str, Tensor]) -> Tensor:
    initialize()
    model = _model(layers=2)
    model.load_state_dict(state, strict=False)
    # Each rank pads to its own longest sample, and one more token.
    return _loss_and_routes(model, _padded([0, 1] if rank == 0 else [2, 3], more=rank))[1]


def test_pipeline_stages_and_replicas_route_like_one_process() -> None:
    ((loss, routes, state),) = run_distributed(_whole, 1)
    (_, of_first_stage), (of_pipeline, _) = run_distributed(_two_stages, 2, state)
    assert of_pipeline == pytest.approx(loss, rel=1e-5)
    assert (of_first_stage - routes).abs().max() < 1e-6
    assert (torch.cat(run_distributed(_two_replicas, 2, state)) - routes).abs().max() < 1e-6
