"""Sums of a step against loops over its rows and images, and the work of a step against torch's own counter."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from parrot_sys.data.batch import PackedBatch
from parrot_sys.data.context_share import share_of_rank
from parrot_sys.modules.gated_cross_attention import GatedCrossAttention
from parrot_sys.modules.lora import LoRAConfig
from parrot_sys.modules.perceiver import PerceiverResampler
from parrot_sys.modules.text_guided_moe import RoutingOutput
from parrot_sys.systems.flops import FlopCounter
from parrot_sys.testing.distributed import run_distributed
from parrot_sys.training.metrics import StepMetrics, counted_languages, describe
from tests.megatron.parrot_reference import CONFIG, MIXED, Sample, V, make_batch
from tests.training.layouts import FLAMINGO

LANGUAGES = ("zh", "ko", "en")  # one that is not among the six
E = CONFIG.moe.num_experts


def _routing(num_images: int, topk: bool) -> RoutingOutput:
    probs = torch.rand(num_images, E)
    indices = None
    if topk:
        indices = probs.topk(2).indices
        probs = torch.zeros_like(probs).scatter(1, indices, probs.gather(1, indices))
    return RoutingOutput(logits=probs.log(), probs=probs, topk_indices=indices)


def _batch() -> PackedBatch:
    return dataclasses.replace(make_batch(MIXED), languages=LANGUAGES, record_ids=("a", "b", "c"))


def _reduced(batches: list[PackedBatch], outputs: list[tuple[torch.Tensor, RoutingOutput | None]]) -> StepMetrics:
    return _with_languages(("en", "zh"), batches, outputs)


def _with_languages(
    languages: tuple[str, ...],
    batches: list[PackedBatch],
    outputs: list[tuple[torch.Tensor, RoutingOutput | None]],
) -> StepMetrics:
    metrics = StepMetrics(E, languages=languages)
    for batch, (losses, routing) in zip(batches, outputs, strict=True):
        metrics.add_losses(batch, losses)
        if routing is not None:
            metrics.add_routes(batch, routing, V)
    metrics.count(flops=2.0)
    metrics.reduce()
    return metrics


@pytest.mark.parametrize("topk", [False, True])
def test_record_matches_loops(topk: bool) -> None:
    batch = _batch()
    losses, routing = torch.rand(batch.label_rows.numel()), _routing(batch.num_images, topk)
    (record,) = run_distributed(lambda rank, size: _reduced([batch], [(losses, routing)]).record(), 1)

    owners = [next(s for s in range(3) if row < batch.cu_seqlens[s + 1]) for row in batch.label_rows.tolist()]
    for sample, name in enumerate(("zh", "other", "en")):
        own = [loss for loss, owner in zip(losses.tolist(), owners, strict=True) if owner == sample]
        assert record[f"loss/{name}"] == pytest.approx(sum(own) / len(own))
    assert record["loss"] == pytest.approx(losses.double().mean().item())
    # sample 0 has one image, sample 1 none, sample 2 two
    assert record["experts/zh/probability"] == pytest.approx(routing.probs[0].tolist())
    assert record["experts/en/probability"] == pytest.approx(routing.probs[1:].mean(0).tolist())
    assert "experts/other/probability" not in record
    assert record["experts/en/rows"] == [V * int((routing.probs[1:, e] > 0).sum()) for e in range(E)]
    assert (record["labels"], record["rows"], record["samples"], record["images"]) == (11, batch.num_rows, 3, 3)


def test_every_number_of_a_record_says_what_it_is_over() -> None:
    batch = _batch()
    outputs = [(torch.rand(batch.label_rows.numel()), _routing(batch.num_images, False))]

    def rank(*_: int) -> dict:
        steps = StepMetrics(E, languages=("en", "zh"))
        for _step in range(3):
            one = _reduced([batch], outputs)
            one.add_aux_loss(torch.tensor(1.0))
            steps.merge(one)
        return steps.record()

    (record,) = run_distributed(rank, 1)
    assert record["batches"] == 3
    assert record["labels"] == 3 * batch.label_rows.numel()
    others = ("lr", "lr/vision", "grad_norm", "epoch", "seconds", "tokens_per_second", "mfu", "skipped_steps")
    for name in (*record, *others):
        assert describe("train", name), name
    for name in ("loss", "loss/zh"):
        assert "the steps since the last record" in describe("train", name)
        assert "held-out records" in describe("validation", name)
        assert "labels" in describe("train", name)
    assert describe("train", "unheard of") == ""


@settings(max_examples=10, deadline=None)
@given(
    before=st.sets(st.sampled_from(["en", "zh", "ko", "pt-BR", "th"])),
    after=st.sets(st.sampled_from(["en", "zh", "ko", "pt-BR", "th"])),
)
def test_languages_are_those_of_the_data_and_sums_survive_a_change_of_them(before: set[str], after: set[str]) -> None:
    batch = _batch()
    losses, routing = torch.rand(batch.label_rows.numel()), _routing(batch.num_images, topk=False)

    def metrics_over(names: set[str]) -> StepMetrics:
        metrics = StepMetrics(E, languages=counted_languages([*names, "", "no code"]))
        metrics.add_losses(batch, losses)
        metrics.add_routes(batch, routing, V)
        return metrics

    def rank(*_: int) -> tuple[dict, dict, dict]:
        metrics = metrics_over(before)
        restored = StepMetrics(E, languages=counted_languages(after))  # a run over other languages goes on
        restored.load_state_dict(metrics.state_dict())
        return metrics.record(), restored.record(), metrics_over(before & after).record()

    ((own, restored, both),) = run_distributed(rank, 1)
    named = {name.removeprefix("loss/") for name in own if name.startswith("loss/")}
    assert named == {name if name in before else "other" for name in LANGUAGES}
    for name, value in restored.items():
        if name.startswith(("loss/", "experts/")):
            assert value == pytest.approx(both[name]), name


def test_routes_are_counted_by_any_language_and_category_on_any_rank() -> None:
    """Three images: one of a sample in zh, two of one in en; ranks and a restart between them change nothing."""
    batch = dataclasses.replace(_batch(), languages=("qaa-x-one", "ko", "pt-BR"), categories=("food", "", "tools"))
    probs = torch.eye(E)[[0, 1, 1]]
    routing = RoutingOutput(logits=probs.log(), probs=probs)
    losses = torch.rand(batch.label_rows.numel())

    def rank_of_two(rank: int, size: int) -> list[dict]:
        records = []
        for restart in (False, True):
            steps = StepMetrics(E, languages=("en",))
            steps.merge(_with_languages(("en",), [batch], [(losses, routing)]))
            if restart:
                saved, steps = steps.state_dict(), StepMetrics(E, languages=("en",))
                steps.load_state_dict(saved)
            steps.merge(_with_languages(("en",), [batch], [(losses, routing)]))
            records.append(steps.record())
        return records

    for one, other in run_distributed(rank_of_two, 2):
        assert one == other
        for kind in ("language", "category"):
            assert one[f"routes/{kind}_bits"] == pytest.approx(0.9183, abs=1e-4)  # entropy of 1 : 2
        assert one["routes/shares"][:2] == pytest.approx([1 / 3, 2 / 3])
        assert one["routes/dead_experts"] == E - 2


def test_ranks_and_steps_add_up() -> None:
    batch, empty = _batch(), PackedBatch.empty()
    losses, routing = torch.rand(batch.label_rows.numel()), _routing(batch.num_images, False)
    nothing = RoutingOutput(logits=torch.empty(0, E), probs=torch.empty(0, E))

    def rank_of_two(rank: int, size: int) -> tuple[dict, float]:
        mine = ([batch], [(losses, routing)]) if rank else ([empty], [(torch.empty(0), nothing)])
        metrics = _reduced(*mine)
        return metrics.record(), metrics.scalar("flops")

    (one,) = run_distributed(lambda rank, size: _reduced([batch], [(losses, routing)]).record(), 1)
    for record, flops in run_distributed(rank_of_two, 2):
        assert record == one
        assert flops == 4.0


def test_shares_of_context_parallel_ranks_add_up() -> None:
    batch = _batch()
    losses, routing = torch.rand(batch.label_rows.numel()), _routing(batch.num_images, True)

    def rank_of_two(rank: int, size: int) -> dict:
        share = share_of_rank(batch, rank, size)
        own = torch.isin(batch.label_rows, share.label_rows)
        images = slice(0, 2) if rank == 0 else slice(2, 3)
        routes = RoutingOutput(
            logits=routing.logits[images], probs=routing.probs[images], topk_indices=routing.topk_indices[images]
        )
        return _reduced([share], [(losses[own], routes)]).record()

    (one,) = run_distributed(lambda rank, size: _reduced([batch], [(losses, routing)]).record(), 1)
    for record in run_distributed(rank_of_two, 2):
        assert record.keys() == one.keys()
        for name, value in one.items():
            assert record[name] == pytest.approx(value), name
    counter = FlopCounter(CONFIG, dict.fromkeys(("vision", "projector", "moe", "llm"), True))
    pixels = make_batch(MIXED, pixels=True)
    shares = [counter.count(share_of_rank(pixels, rank, 4)) for rank in range(4)]
    assert sum(shares) == pytest.approx(counter.count(pixels))


def test_only_contributing_ranks_count_but_any_may_stop() -> None:
    def rank_of_two(rank: int, size: int) -> tuple[float, float]:
        metrics = StepMetrics(E, languages=("en", "zh"))
        metrics.count(labels=3, stop=rank)
        metrics.reduce(contribute=rank == 0)
        return metrics.scalar("labels"), metrics.scalar("stop")

    assert run_distributed(rank_of_two, 2) == [(3.0, 1.0)] * 2


def test_one_nan_shows() -> None:
    metrics = StepMetrics(E, languages=("en", "zh"))
    assert metrics.is_finite()
    batch = make_batch(MIXED)
    metrics.add_losses(batch, torch.full((batch.label_rows.numel(),), float("nan")))
    assert not metrics.is_finite()


def test_flops_of_the_decoder_match_torchs_counter() -> None:
    llm, length, labels = CONFIG.llm, 24, 9
    reference = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=llm.hidden_size,
            num_hidden_layers=llm.num_layers,
            num_attention_heads=llm.num_attention_heads,
            num_key_value_heads=llm.num_query_groups,
            intermediate_size=llm.ffn_hidden_size,
            vocab_size=llm.vocab_size,
            attn_implementation="eager",
        )
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hidden = reference.model(torch.zeros(1, length, dtype=torch.int64)).last_hidden_state
        reference.lm_head(hidden[:, :labels])
    full_attention = 4 * llm.num_layers * length**2 * llm.num_attention_heads * llm.kv_channels
    expected = counter.get_total_flops() - full_attention / 2  # ours counts the causal half

    batch = make_batch((Sample(prompt=length - labels, images=0, answer=labels),))
    frozen = dict.fromkeys(("vision", "projector", "moe", "llm"), False)
    assert FlopCounter(CONFIG, frozen).count(batch) == expected
    assert FlopCounter(CONFIG, frozen | {"llm": True}).count(batch) == 3 * expected
    assert FlopCounter(CONFIG, frozen | {"projector": True}).count(batch) == 2 * expected


def test_flops_of_lora_beside_a_frozen_decoder() -> None:
    lora = dataclasses.replace(CONFIG, lora=LoRAConfig(rank=3, targets=("q_proj", "down_proj")))
    batch = make_batch((Sample(prompt=5, images=0, answer=2),))
    frozen = dict.fromkeys(("vision", "projector", "moe", "llm"), False)
    llm = FlopCounter(CONFIG, frozen).count(batch)
    size, ffn, layers = CONFIG.llm.hidden_size, CONFIG.llm.ffn_hidden_size, CONFIG.llm.num_layers
    updates = 2 * 7 * layers * 3 * (2 * size + size + ffn)
    assert FlopCounter(lora, frozen | {"lora": False}).count(batch) == llm + updates
    assert FlopCounter(lora, frozen | {"lora": True}).count(batch) == 2 * llm + 3 * updates


def test_flops_of_images_count_projector_experts_and_tower() -> None:
    frozen = dict.fromkeys(("vision", "projector", "moe", "llm"), False)
    counter, plain = (FlopCounter(CONFIG, frozen, bypass=bypass) for bypass in ((), ("moe",)))
    hidden, width, inner = CONFIG.llm.hidden_size, CONFIG.vision.hidden_size, CONFIG.moe.ffn_hidden_size
    samples = (Sample(prompt=3, images=2, answer=2),)
    cached, pixels = make_batch(samples), make_batch(samples, pixels=True)
    assert counter.count(cached) - plain.count(cached) == 2 * V * 6 * hidden * inner * E
    text = dataclasses.replace(cached, image_sample=cached.image_sample[:0], image_features=None)
    assert plain.count(cached) - plain.count(text) == 2 * V * 2 * (width * hidden + hidden * hidden)
    assert counter.count(pixels) > counter.count(cached)


def test_flops_of_resampler_and_gated_blocks() -> None:
    flamingo = FLAMINGO.flamingo
    frozen = dict.fromkeys(("vision", "projector", "moe", "llm", "lora", "resampler", "cross_attention"), False)
    counter = FlopCounter(dataclasses.replace(FLAMINGO, lora=None), frozen)
    batch = make_batch((Sample(prompt=3, images=2, answer=2),), rows_per_image=1)
    text = dataclasses.replace(
        batch, visual_rows=batch.visual_rows[:0], image_sample=batch.image_sample[:0], image_features=None
    )
    width, hidden, latents = FLAMINGO.vision.hidden_size, FLAMINGO.llm.hidden_size, flamingo.resampler.num_latents
    resampler = PerceiverResampler(flamingo.resampler, width).requires_grad_(False)
    block = GatedCrossAttention(flamingo.cross_attention, hidden, width).requires_grad_(False)
    with FlopCounterMode(display=False) as mode, torch.no_grad():
        resampler(torch.zeros(2, V, width))
        for _ in range(2):
            block.attention.keys_values(torch.zeros(2 * latents, width))
            rows = block.attention.to_q(torch.zeros(batch.num_rows, hidden))
            block.mlp(block.attention.to_out(rows))
    cross = flamingo.cross_attention
    # (The mode does not see into fused attention.)
    attention = 2 * 4 * latents * (V + latents) * flamingo.resampler.num_attention_heads * flamingo.resampler.head_dim
    attention += 2 * 4 * batch.num_rows * latents * cross.num_attention_heads * cross.head_dim
    assert counter.count(batch) - counter.count(text) == mode.get_total_flops() + attention
