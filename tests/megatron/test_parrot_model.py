"""MultimodalModel: forward and backward pass, stages, micro-batches without images, presets, checkpoints, ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import Tensor, nn

from parrot_sys.data.batch import PackedBatch
from parrot_sys.errors import ConfigError, DataError
from parrot_sys.megatron.model import MultimodalModel
from parrot_sys.megatron.runtime.initialize import ParallelConfig, initialize, shutdown
from parrot_sys.models.llm import LLMConfig
from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.modules.text_guided_moe import RoutingOverride
from parrot_sys.systems.build import build_model
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.export import released_tensors
from parrot_sys.systems.parts import part_parameters, set_trainable
from parrot_sys.testing.distributed import run_distributed
from tests.comparisons import differ
from tests.megatron.decoder_reference import build_reference, copy_weights, megatron_tensors
from tests.megatron.pages import prompts, step_batch
from tests.megatron.parrot_reference import CONFIG, MIXED, Sample, V, make_batch, reference_logits

BATCHES = {
    "mixed": MIXED,
    "text-only": (Sample(prompt=4, images=0, answer=3),),
    "one-image": (Sample(prompt=2, images=1, answer=1),),
    "images-only-prompt-of-one": (Sample(prompt=1, images=3, answer=2),),
}


@pytest.fixture(autouse=True)
def _groups() -> Iterator[None]:
    initialize()
    yield
    shutdown()


def _model(config: ParrotConfig = CONFIG, **options: object) -> MultimodalModel:
    torch.manual_seed(11)
    model = build_model(config, with_vision_tower=False, **options)
    return model


def _relative(got: Tensor, wanted: Tensor) -> float:
    return float(((got - wanted).abs().max() / wanted.abs().max()).detach())


@pytest.mark.parametrize("name", BATCHES)
def test_forward_and_gradients_match_sample_by_sample(name: str) -> None:
    batch, model, reference = make_batch(BATCHES[name]), _model(), build_reference(CONFIG.llm)
    copy_weights(CONFIG.llm, reference, model.decoder)
    plain = _model()
    wanted = reference_logits(reference, plain, batch, batch.image_features)
    assert _relative(model(batch, mode="logits").logits, wanted) < 1e-5

    wanted_losses = F.cross_entropy(wanted[batch.label_rows], batch.labels[batch.label_rows], reduction="none")
    output = model(batch)
    assert output.losses.shape == (batch.label_rows.numel(),)
    assert _relative(output.losses, wanted_losses) < 1e-5
    output.losses.sum().backward()
    wanted_losses.sum().backward()
    parts = ("projector", "moe") if batch.num_images else ()
    for part in parts:
        for (key, ours), theirs in zip(
            getattr(model, part).named_parameters(), getattr(plain, part).parameters(), strict=True
        ):
            assert _relative(ours.grad, theirs.grad) < 5e-5, f"{part}.{key}"
    got = dict(model.decoder.named_parameters())
    for key, gradient in megatron_tensors(CONFIG.llm, {n: p.grad for n, p in reference.named_parameters()}):
        assert _relative(got[key].grad, gradient) < 5e-5, key


def test_stage_one_bypasses_the_moe() -> None:
    batch, model, reference = make_batch(MIXED), _model(bypass=("moe",)), build_reference(CONFIG.llm)
    copy_weights(CONFIG.llm, reference, model.decoder)
    set_trainable(model, {"moe": False, "llm": False})
    output = model(batch)
    wanted = reference_logits(reference, model, batch, batch.image_features, use_moe=False)
    assert output.routing is None
    assert _relative(model(batch, mode="logits").logits, wanted) < 1e-5
    output.losses.sum().backward()
    assert all(p.grad is not None and differ(p.grad, p.grad * 0) for p in model.projector.parameters())
    assert all(p.grad is None for part in (model.moe, model.decoder) for p in part.parameters())


def test_truncated_image_uses_the_rows_that_are_left() -> None:
    model = _model()
    full = make_batch((Sample(prompt=1, images=1, answer=1),))
    keep = 3
    cut = dataclasses.replace(
        full,
        input_ids=full.input_ids[: 1 + keep],
        labels=full.labels[: 1 + keep],
        label_rows=full.label_rows[:0],
        position_ids=full.position_ids[: 1 + keep],
        cu_seqlens=torch.tensor([0, 1 + keep], dtype=torch.int32),
        max_seqlen=1 + keep,
        visual_rows=full.visual_rows[:keep],
        visual_source=full.visual_source[:keep],
    )
    assert _relative(model(cut, mode="logits").logits, model(full, mode="logits").logits[: 1 + keep]) < 1e-5


@pytest.mark.parametrize("batch", [PackedBatch.empty(), make_batch(BATCHES["text-only"])], ids=["empty", "text-only"])
@pytest.mark.parametrize("tower", [False, True])
def test_every_parameter_gets_a_gradient_without_images(batch: PackedBatch, tower: bool) -> None:
    model = build_model(CONFIG, with_vision_tower=tower)
    output = model(batch)
    assert output.routing.probs.shape == (0, 3)
    output.losses.sum().backward()
    unused = {"vision_tower"} if not tower else set()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None or name.split(".")[0] in unused, name


def test_trainable_tower_learns_and_frozen_tower_builds_no_graph() -> None:
    batch = make_batch(MIXED, pixels=True)
    model = build_model(CONFIG)
    model(batch).losses.sum().backward()
    assert all(p.grad is not None for p in part_parameters(model)["vision"])
    with pytest.raises(DataError, match="cached image features"):
        model(make_batch(MIXED))
    set_trainable(model, {"vision": False})
    with torch.no_grad():
        features = model.vision_tower(batch.pixel_values)
    cached = dataclasses.replace(batch, pixel_values=None, image_features=features)
    seen = []
    model.vision_tower.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    assert torch.equal(model(batch).losses, model(cached).losses)
    assert seen == [False]
    with pytest.raises(DataError, match="without its vision tower"):
        _model()(batch)


def test_recompute_gives_the_same_gradients() -> None:
    batch, gradients = make_batch(MIXED), []
    for recompute in ("none", "full"):
        model = _model(recompute=recompute)
        model(batch).losses.sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_routing_override_reaches_the_logits() -> None:
    batch, model = make_batch(MIXED), _model().eval()
    with torch.no_grad():
        plain = model(batch, mode="logits").logits
        off = model(batch, mode="logits", routing_override=RoutingOverride(mode="off")).logits
        bypassed = _model(bypass=("moe",)).eval()(batch, mode="logits").logits
    assert torch.equal(off, bypassed)
    assert differ(off, plain, atol=1e-6)


def test_generation_with_cache_equals_full_recomputation() -> None:
    model, steps = _model().eval(), 4
    batch = make_batch(MIXED)
    generator = torch.Generator().manual_seed(2)
    answers = torch.randint(0, CONFIG.llm.vocab_size, (steps, batch.num_samples), generator=generator)
    last = batch.cu_seqlens[1:].long() - 1
    with torch.no_grad():
        pages, prompt, rows = prompts(model, batch, steps)
        first = model(prompt, mode="logits", logits_rows=last, paged=rows)
        assert _relative(first.logits, model(batch, mode="logits").logits[last]) < 1e-5
        for step in range(steps):
            one = step_batch(answers[step], pages.lengths)
            logits = model(one, mode="logits", paged=pages.rows([1] * batch.num_samples)).logits
            longer = _append(batch, answers[: step + 1])
            wanted = model(longer, mode="logits", logits_rows=longer.cu_seqlens[1:].long() - 1).logits
            assert _relative(logits, wanted) < 1e-5


def _append(batch: PackedBatch, rows: Tensor) -> PackedBatch:
    """The batch with `rows[:, s]` at the end of sample s."""
    steps, bounds = rows.shape[0], batch.cu_seqlens.tolist()
    spans = list(pairwise(bounds))
    sample_of = torch.repeat_interleave(torch.arange(len(spans)), batch.cu_seqlens.diff().long())

    def moved(index: Tensor) -> Tensor:
        return index + steps * sample_of[index]

    return dataclasses.replace(
        batch,
        input_ids=torch.cat([torch.cat([batch.input_ids[a:b], rows[:, s]]) for s, (a, b) in enumerate(spans)]),
        position_ids=torch.cat([torch.arange(b - a + steps) for a, b in spans]),
        cu_seqlens=batch.cu_seqlens + steps * torch.arange(len(bounds), dtype=torch.int32),
        max_seqlen=batch.max_seqlen + steps,
        visual_rows=moved(batch.visual_rows),
        guidance_rows=moved(batch.guidance_rows),
    )


PAPER_SIZES = {  # hidden size, layers, heads, groups, ffn, vocabulary -> projector, MoE and decoder parameters
    "7b": ((4096, 32, 32, 32, 11008, 151936), 20_979_712, 302_014_464, 7_721_324_544),
    "14b": ((5120, 40, 40, 40, 13696, 152064), 31_467_520, 377_518_080, 14_167_290_880),
    "32b": ((5120, 64, 40, 8, 27392, 152064), 31_467_520, 377_518_080, 32_512_218_112),
    "qwen2-7b": ((3584, 28, 28, 4, 18944, 152064), 16_522_240, 264_262_656, 7_615_616_512),
}


@pytest.mark.parametrize("name", PAPER_SIZES)
def test_presets_of_the_paper_have_the_published_sizes(name: str) -> None:
    (hidden, layers, heads, groups, ffn, vocabulary), projector, moe, llm = PAPER_SIZES[name]
    config = ParrotConfig(
        llm=LLMConfig(
            hidden_size=hidden,
            num_layers=layers,
            num_attention_heads=heads,
            num_query_groups=groups,
            ffn_hidden_size=ffn,
            vocab_size=vocabulary,
        )
    )
    model = build_model(config, device="meta", dtype=torch.bfloat16, with_vision_tower=False)
    counts = {part: sum(p.numel() for p in ps) for part, ps in part_parameters(model).items()}
    held = {part: count for part, count in counts.items() if count}
    assert held == {"projector": projector, "moe": moe, "llm": llm}
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())


def test_unknown_part_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"parts of the model are vision, llm, .*, got tower"):
        set_trainable(_model(), {"tower": False})


def test_no_experts_builds_a_plain_projector() -> None:
    model = _model(dataclasses.replace(CONFIG, moe=TextGuidedMoEConfig(num_experts=0)))
    output = model(make_batch(MIXED))
    assert model.moe is None
    assert output.routing is None
    assert output.losses.isfinite().all()


def _round_trip(folder: str, tie: bool) -> bool:
    """Save a model, load it into one with other weights, compare bit by bit."""
    config = dataclasses.replace(CONFIG, llm=dataclasses.replace(CONFIG.llm, tie_word_embeddings=tie))
    torch.manual_seed(1)
    saved = build_model(config)
    torch.manual_seed(2)
    loaded = build_model(config)
    dist_checkpointing.save({"model": saved.sharded_state_dict()}, folder)
    state = dist_checkpointing.load({"model": loaded.sharded_state_dict()}, folder)
    loaded.load_state_dict(state["model"])
    return all(torch.equal(a, b) for a, b in zip(saved.parameters(), loaded.parameters(), strict=True))


@pytest.mark.parametrize("tie", [False, True])
def test_distributed_checkpoint_round_trip(tmp_path: Path, tie: bool) -> None:
    assert _round_trip(str(tmp_path), tie)


def _data_parallel_rank(rank: int, size: int, overlap: bool) -> tuple[float, dict[str, Tensor]]:
    """Two ranks, one of them without any image: loss of both and the reduced gradients."""
    initialize(ParallelConfig())
    batch = make_batch((MIXED[0], MIXED[2])) if rank == 0 else make_batch((MIXED[1],), seed=8)
    model = _model()
    ddp_config = DistributedDataParallelConfig(overlap_grad_reduce=overlap, bucket_size=4000 if overlap else None)
    wrapped = DistributedDataParallel(model.config, ddp_config, model)
    wrapped.zero_grad_buffer()
    losses = wrapped(batch).losses
    losses.sum().backward()
    wrapped.finish_grad_sync()
    total = losses.detach().sum()
    torch.distributed.all_reduce(total)
    gradients = {name: p.main_grad * size for name, p in model.named_parameters()}
    shutdown_groups = {name: g.clone() for name, g in gradients.items()}
    parallel_state.destroy_model_parallel()
    return float(total), shutdown_groups


def _validation_rank(rank: int, size: int) -> float:
    """Auxiliary losses are on, one rank has no image, and nobody learns."""
    initialize(ParallelConfig())
    moe = dataclasses.replace(CONFIG.moe, aux_loss_coeff=0.1, z_loss_coeff=0.1)
    model = _model(dataclasses.replace(CONFIG, moe=moe)).eval()
    with torch.no_grad():
        output = model(make_batch((MIXED[rank],)))
    assert (output.routing is None) == (rank == 1)
    parallel_state.destroy_model_parallel()
    return output.losses.mean().item()


def test_validation_needs_no_other_rank() -> None:
    shutdown()
    assert all(loss > 0 for loss in run_distributed(_validation_rank, 2, timeout=30.0))


def _auxiliary_rank(rank: int, size: int) -> tuple[float, Tensor]:
    initialize(ParallelConfig())
    moe = dataclasses.replace(CONFIG.moe, aux_loss_coeff=0.1, z_loss_coeff=0.1)
    model = _model(dataclasses.replace(CONFIG, moe=moe))
    routing = model(make_batch((MIXED[1 - rank],))).routing  # the first rank has no image
    loss = routing.aux_loss + routing.z_loss
    loss.backward()
    gradient = model.moe.router_weight.grad
    torch.distributed.all_reduce(gradient)
    parallel_state.destroy_model_parallel()
    return loss.item(), gradient


def test_auxiliary_losses_count_the_images_of_all_ranks() -> None:
    moe = dataclasses.replace(CONFIG.moe, aux_loss_coeff=0.1, z_loss_coeff=0.1)
    model = _model(dataclasses.replace(CONFIG, moe=moe))
    routing = model(make_batch((MIXED[0],))).routing
    wanted = routing.aux_loss + routing.z_loss
    wanted.backward()
    shutdown()
    for loss, gradient in run_distributed(_auxiliary_rank, 2):
        assert loss == pytest.approx(wanted.item(), rel=1e-6)
        assert _relative(gradient, model.moe.router_weight.grad) < 1e-5


@pytest.mark.parametrize("overlap", [False, True])
def test_two_ranks_equal_one(overlap: bool) -> None:
    model = _model()
    batches = [make_batch((MIXED[0], MIXED[2])), make_batch((MIXED[1],), seed=8)]
    loss_sum = torch.stack([model(batch).losses.sum() for batch in batches]).sum()
    loss_sum.backward()
    total = loss_sum.item()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    shutdown()
    for loss, gradients in run_distributed(_data_parallel_rank, 2, overlap):
        assert abs(loss - total) / total < 1e-6
        for name, gradient in gradients.items():
            assert _relative(gradient, wanted[name]) < 5e-6, name


def _tensor_parallel_rank(rank: int, size: int, sequence_parallel: bool) -> tuple[Tensor, dict[str, Tensor]]:
    parallel = ParallelConfig(tensor_model_parallel_size=size, sequence_parallel=sequence_parallel)
    initialize(parallel)
    model = _model(parallel=parallel)
    losses = model(make_batch(MIXED)).losses
    losses.sum().backward()
    gradients = dict(released_tensors(model, value=lambda tensor: tensor.grad))
    parallel_state.destroy_model_parallel()
    return losses.detach(), gradients


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel_from_one_seed_equals_one_rank(sequence_parallel: bool) -> None:
    model = _model()
    wanted = model(make_batch(MIXED)).losses
    wanted.sum().backward()
    whole = dict(released_tensors(model, value=lambda tensor: tensor.grad))
    shutdown()
    for losses, gradients in run_distributed(_tensor_parallel_rank, 2, sequence_parallel):
        assert _relative(losses, wanted) < 1e-5
        for name in ("model.embed_tokens.weight", *(n for n in whole if "mm_projector" in n or "moe_model" in n)):
            assert _relative(gradients[name], whole[name]) < 1e-5, name


def test_modules_are_registered_under_the_names_of_the_parts() -> None:
    model = build_model(CONFIG)
    assert {name for name, _ in model.named_children()} == {"vision_tower", "projector", "moe", "decoder"}
    assert isinstance(model.projector, nn.Module)
    assert V == 5
