"""One step on Megatron's schedule, buffers and optimizer against the same step in plain PyTorch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch._dynamo  # every optimizer imports it: once here instead of a second in each forked rank
from torch import Tensor

from parrot_sys.data.batch import PackedBatch
from parrot_sys.data.languages import MMMB_LANGUAGES
from parrot_sys.megatron.model import MultimodalModel
from parrot_sys.megatron.runtime.initialize import ParallelConfig, initialize
from parrot_sys.megatron.runtime.optimizer import build_optimizer, wrap_data_parallel
from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.systems.build import build_model
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.flops import FlopCounter
from parrot_sys.systems.parts import part_parameters, set_trainable
from parrot_sys.systems.registry import part_of
from parrot_sys.testing.distributed import run_distributed
from parrot_sys.training.faults import TrainingError
from parrot_sys.training.step import StepRunner
from tests.megatron.parrot_reference import CONFIG, MIXED, Sample, V, make_batch
from tests.training.auxiliary_losses import COEFFICIENTS, auxiliary_losses

FIRST = make_batch(MIXED, seed=1)
SECOND = make_batch((Sample(prompt=4, images=1, answer=9),), seed=2)
TEXT = make_batch((Sample(prompt=4, images=0, answer=3), Sample(prompt=2, images=0, answer=5)), seed=3)
EMPTY = PackedBatch.empty()
LR = 1e-2
FROZEN = {"vision": False, "projector": True, "moe": True, "llm": True}

State = dict[str, Tensor]


def _model(
    config: ParrotConfig, dtype: torch.dtype, recompute: str, parallel: ParallelConfig, tower: bool = False
) -> MultimodalModel:
    torch.manual_seed(11)
    return build_model(config, parallel, dtype=dtype, recompute=recompute, with_vision_tower=tower)


def _train(
    rank: int,
    per_rank: Sequence[Sequence[PackedBatch]],
    *,
    config: ParrotConfig = CONFIG,
    trainable: dict[str, bool] = FROZEN,
    dtype: torch.dtype = torch.float32,
    recompute: str = "none",
    reduction: str = "global",
    distributed: bool = False,
    overlap: bool = False,
    tensor_parallel: int = 1,
    context_parallel: int = 1,
    with_vision_tower: bool = False,
    steps: int = 1,
    clip: float = 1.0,
    **optimizer: Any,
) -> tuple[list[float], list[float], State, State]:
    """Losses (with auxiliary ones) and norms of `steps` steps, gradients of the first, parameters.

    The gradients are those before clipping only with clip=0.
    """
    parallel = ParallelConfig(tensor_model_parallel_size=tensor_parallel, context_parallel_size=context_parallel)
    initialize(parallel)
    model = _model(config, dtype, recompute, parallel, with_vision_tower)
    set_trainable(model, trainable)
    wrapped = wrap_data_parallel([model], distributed_optimizer=distributed, overlap=overlap)
    owner = functools.partial(part_of, model=config)
    adam = build_optimizer(wrapped, lr=LR, clip_grad=clip, part_of=owner, **optimizer)
    for group in adam.param_groups:
        group["lr"] = group["max_lr"]
    runner = StepRunner(
        chunks=wrapped,
        device=torch.device("cpu"),
        num_experts=config.moe.num_experts,
        languages=MMMB_LANGUAGES,
        num_visual_rows=V,
        reduction=reduction,
        optimizer=adam,
        flops=FlopCounter(config, trainable),
    )
    losses, norms, gradients = [], [], {}
    for step in range(steps):
        result = runner.train(per_rank[rank // parallel.model_parallel_size], step + 1)
        losses.append(result.metrics.loss + result.metrics.scalar("aux_loss"))
        norms.append(result.grad_norm)
        gradients = gradients or {n: p.main_grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return losses, norms, gradients, {n: p.detach().clone() for n, p in model.named_parameters()}


def _run(per_rank: Sequence[Sequence[PackedBatch]], **settings: Any) -> tuple[list[float], list[float], State, State]:
    """`_train` on as many ranks as `per_rank` has lists; checks that they agree and returns the first one's results."""
    size = len(per_rank) * settings.get("tensor_parallel", 1) * settings.get("context_parallel", 1)
    results = run_distributed(lambda rank, size: _train(rank, per_rank, **settings), size)
    for losses, norms, _, parameters in results[1:]:
        assert (losses, norms) == (results[0][0], results[0][1])
        if settings.get("tensor_parallel", 1) == 1:
            assert all(torch.equal(p, results[0][3][name]) for name, p in parameters.items())
    return results[0]


def _plain(
    batches: Sequence[PackedBatch],
    *,
    config: ParrotConfig = CONFIG,
    reduction: str = "global",
    steps: int = 1,
    clip: float = 1.0,
    weight_decay: float = 0.0,
    part_lrs: dict[str, float] | None = None,
) -> tuple[list[float], list[float], State, State]:
    """The same steps without Megatron's buffers, schedule and optimizer: autograd, clipping and AdamW of torch."""

    def train(rank: int, size: int) -> tuple[list[float], list[float], State, State]:
        initialize()
        # Without auxiliary losses of its own: they are added from their definitions.
        moe = dataclasses.replace(config.moe, **dict.fromkeys(COEFFICIENTS, 0.0))
        model = _model(dataclasses.replace(config, moe=moe), torch.float32, "none", ParallelConfig())
        groups = []
        for part, parameters in part_parameters(model).items():
            for parameter in parameters:
                decay = weight_decay if parameter.dim() > 1 else 0.0
                groups.append({"params": [parameter], "lr": (part_lrs or {}).get(part, LR), "weight_decay": decay})
        adam = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
        losses, norms, gradients = [], [], {}
        for _ in range(steps):
            outputs = [model(batch) for batch in batches if batch.num_rows]
            total = sum(output.losses.sum() for output in outputs)
            labels = sum(output.losses.numel() for output in outputs)
            loss = total / labels
            if reduction == "micro_batch":
                loss = sum(output.losses.mean() for output in outputs) / len(outputs)
            languages = [batch.image_languages() for batch in batches if batch.num_rows]
            extra = auxiliary_losses([output.routing for output in outputs], languages, config.moe)
            (loss + extra).backward()
            gradients = gradients or {n: p.grad.clone() for n, p in model.named_parameters()}
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))
            losses.append((total / labels + extra).item())
            norms.append(norm.item())
            adam.step()
            adam.zero_grad()
        return losses, norms, gradients, {n: p.detach().clone() for n, p in model.named_parameters()}

    return run_distributed(train, 1)[0]


def _assert_same(got: Any, wanted: Any, *, parameters: bool = True) -> None:
    assert got[0] == pytest.approx(wanted[0], rel=1e-5)
    assert got[1] == pytest.approx(wanted[1], rel=1e-4)
    scale = max(gradient.abs().max().item() for gradient in wanted[2].values())
    for name, gradient in got[2].items():
        bound = max(wanted[2][name].abs().max().item(), 1e-4 * scale)
        assert (gradient - wanted[2][name]).abs().max().item() <= 2e-5 * bound, f"gradient of {name}"
    if parameters:
        for name, parameter in got[3].items():
            # Adam turns the sign of a gradient that is zero but for rounding into a step: compare where it is not.
            sure = wanted[2][name].abs() > 1e-5 * scale if name in wanted[2] else slice(None)
            torch.testing.assert_close(parameter[sure], wanted[3][name][sure], rtol=1e-3, atol=2e-5, msg=name)


LAYOUTS = {
    "one rank": [[FIRST, SECOND, TEXT]],
    "two ranks": [[FIRST, EMPTY], [SECOND, TEXT]],
    "text and images": [[TEXT, EMPTY], [FIRST, SECOND]],
    "a rank without anything": [[FIRST, SECOND, TEXT], [EMPTY, EMPTY, EMPTY]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("overlap", [False, True])
def test_gradients_are_those_of_plain_torch(layout: str, overlap: bool) -> None:
    got = _run(LAYOUTS[layout], overlap=overlap, clip=0.0)
    _assert_same(got, _plain([FIRST, SECOND, TEXT], clip=0.0))


@pytest.mark.parametrize("layout", ["one rank", "two ranks"])
@pytest.mark.parametrize("distributed", [False, True])
def test_three_clipped_steps_are_those_of_plain_torch(layout: str, distributed: bool) -> None:
    settings = {"steps": 3, "clip": 0.3, "weight_decay": 0.1, "part_lrs": {"projector": 3e-2, "llm": 1e-3}}
    got, wanted = _run(LAYOUTS[layout], distributed=distributed, **settings), _plain([FIRST, SECOND, TEXT], **settings)
    assert wanted[1][0] > 0.3, "the gradient has to be clipped"
    assert got[0] == pytest.approx(wanted[0], rel=1e-4)
    assert got[1] == pytest.approx(wanted[1], rel=1e-3)
    assert got[0][0] > got[0][2]


@pytest.mark.parametrize("layout", ["one rank", "two ranks"])
def test_micro_batch_reduction_is_the_mean_of_means_of_those_that_have_labels(layout: str) -> None:
    got = _run(LAYOUTS[layout], reduction="micro_batch", clip=0.0)
    _assert_same(got, _plain([FIRST, SECOND, TEXT], reduction="micro_batch", clip=0.0))


@pytest.mark.parametrize("ranks", [1, 2])
def test_auxiliary_losses_are_over_all_ranks(ranks: int) -> None:
    moe = TextGuidedMoEConfig(
        num_experts=3, ffn_hidden_size=20, routing="topk", topk=2, aux_loss_coeff=0.5, z_loss_coeff=0.1
    )
    config = dataclasses.replace(CONFIG, moe=moe)
    both = make_batch((*MIXED, *MIXED), seed=5)
    halves = _halves(both)
    got = _run([[both]] if ranks == 1 else [[half] for half in halves], config=config, clip=0.0)
    _assert_same(got, _plain([both], config=config, clip=0.0))
    without = dataclasses.replace(config, moe=dataclasses.replace(moe, aux_loss_coeff=0.0, z_loss_coeff=0.0))
    assert _run([[both]], config=without, clip=0.0)[1] != got[1]


BOTH = make_batch((*MIXED, *MIXED), seed=5)
SPLITS = {
    "one micro-batch": lambda a, b: [[BOTH]],
    "two micro-batches": lambda a, b: [[a, b]],
    "one without images": lambda a, b: [[a, EMPTY, b]],
    "two ranks": lambda a, b: [[a], [b]],
    "two ranks, some without images": lambda a, b: [[a, b], [EMPTY, EMPTY]],
    "two ranks, uneven": lambda a, b: [[EMPTY, a], [b, EMPTY]],
}


@pytest.mark.parametrize("routing", ["dense", "topk"])
@pytest.mark.parametrize("losses", ["balance", "information"])
@pytest.mark.parametrize("split", SPLITS)
def test_auxiliary_losses_are_those_of_the_global_batch(split: str, losses: str, routing: str) -> None:
    # Strong enough that the router's gradient is theirs.
    moe = TextGuidedMoEConfig(
        num_experts=3, ffn_hidden_size=20, routing=routing, topk=1, aux_loss_coeff=50.0, z_loss_coeff=5.0
    )
    if losses == "information":
        moe = dataclasses.replace(
            moe,
            aux_loss_coeff=0.0,
            z_loss_coeff=0.0,
            information_coeff=50.0,
            evenness_coeff=20.0,
            entropy_coeff=10.0,
            normalize_guidance=True,
            router_scale=10.0,  # where routes are uniform, information has no gradient but rounding
        )
    config = dataclasses.replace(CONFIG, moe=moe)
    got = _run(SPLITS[split](*_halves(BOTH)), config=config, clip=0.0)
    wanted = _plain([BOTH], config=config, clip=0.0)
    assert got[0] == pytest.approx(wanted[0], rel=1e-6)
    gradient, router = (result[2]["moe.router_weight"] for result in (got, wanted))
    assert (gradient - router).abs().max() <= 1e-6 * router.abs().max()
    _assert_same(got, wanted)


@pytest.mark.parametrize("routing", ["dense", "topk"])
def test_a_micro_batch_of_text_leaves_the_auxiliary_losses_alone(routing: str) -> None:
    moe = TextGuidedMoEConfig(
        num_experts=3,
        ffn_hidden_size=20,
        routing=routing,
        topk=1,
        aux_loss_coeff=5.0,
        z_loss_coeff=0.5,
        information_coeff=2.0,
        evenness_coeff=0.5,
        entropy_coeff=0.5,
    )
    config = dataclasses.replace(CONFIG, moe=moe)
    wanted = _plain([FIRST, SECOND, TEXT], config=config, clip=0.0)
    for layout in LAYOUTS.values():
        _assert_same(_run(layout, config=config, clip=0.0), wanted)


@pytest.mark.parametrize("trainable", [False, True])
def test_auxiliary_losses_from_pixels(trainable: bool) -> None:
    """A tower that learns runs again for the counts; a frozen one runs once."""
    moe = TextGuidedMoEConfig(num_experts=3, ffn_hidden_size=20, routing="topk", topk=1, aux_loss_coeff=50.0)
    both = make_batch((*MIXED, *MIXED), pixels=True, seed=5)
    settings: dict[str, Any] = {
        "config": dataclasses.replace(CONFIG, moe=moe),
        "trainable": FROZEN | {"vision": trainable},
        "with_vision_tower": True,
        "clip": 0.0,
    }
    _assert_same(_run([[*_halves(both), EMPTY]], **settings), _run([[both]], **settings))


def _halves(batch: PackedBatch) -> tuple[PackedBatch, PackedBatch]:
    """A batch of twice the MIXED samples as two of MIXED size, with the same ids and features."""
    rows, images = int(batch.cu_seqlens[3]), 3
    guidance = int((batch.guidance_rows < rows).sum())
    parts = []
    for half in (0, 1):
        row, first, guide = half * rows, half * images, half * guidance
        labels = batch.labels[row : row + rows]
        ids = batch.input_ids[row : row + rows]
        visual = (ids < 0).nonzero().flatten()
        parts.append(
            dataclasses.replace(
                batch,
                input_ids=ids,
                labels=labels,
                label_rows=(labels >= 0).nonzero().flatten(),
                position_ids=batch.position_ids[row : row + rows],
                cu_seqlens=batch.cu_seqlens[3 * half : 3 * half + 4] - row,
                visual_rows=visual,
                visual_source=torch.arange(visual.numel()),
                guidance_rows=batch.guidance_rows[guide : guide + guidance] - row,
                guidance_start=batch.guidance_start[first : first + images] - guide,
                guidance_end=batch.guidance_end[first : first + images] - guide,
                image_sample=batch.image_sample[first : first + images] - 3 * half,
                **{
                    name: value[first : first + images]
                    for name in ("image_features", "pixel_values")
                    if (value := getattr(batch, name)) is not None
                },
            )
        )
    return parts[0], parts[1]


def test_frozen_parts_have_no_buffers_and_stay() -> None:
    trainable = {"vision": False, "projector": True, "moe": False, "llm": False}
    losses, _, gradients, parameters = _run(LAYOUTS["two ranks"], trainable=trainable, steps=2)
    _, _, _, before = _run(LAYOUTS["two ranks"], trainable=trainable, steps=0)
    assert {name.split(".")[0] for name in gradients} == {"projector"}
    for name, parameter in parameters.items():
        assert torch.equal(parameter, before[name]) != name.startswith("projector."), name
    assert losses[1] < losses[0]


def test_recomputation_changes_nothing() -> None:
    plain, again = (_run(LAYOUTS["two ranks"], recompute=recompute, clip=0.0) for recompute in ("none", "full"))
    _assert_same(again, plain)


def test_tensor_parallel_ranks_give_the_same_losses() -> None:
    got = _run([[FIRST, SECOND, TEXT]], tensor_parallel=2, steps=3)
    wanted = _run([[FIRST, SECOND, TEXT]], steps=3)
    assert got[0] == pytest.approx(wanted[0], rel=1e-5)
    assert got[1] == pytest.approx(wanted[1], rel=1e-4)


@pytest.mark.parametrize(("distributed", "context_parallel"), [(False, 1), (True, 1), (True, 2)])
def test_bf16_follows_fp32(distributed: bool, context_parallel: int) -> None:
    settings = {"distributed": distributed, "context_parallel": context_parallel}
    half = _run(LAYOUTS["two ranks"], dtype=torch.bfloat16, steps=3, **settings)
    full = _run(LAYOUTS["two ranks"], steps=3)
    assert half[3]["projector.0.weight"].dtype == torch.bfloat16
    assert half[2]["projector.0.weight"].dtype == torch.float32
    assert half[0] == pytest.approx(full[0], rel=3e-2)
    assert half[0][2] < half[0][0]


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_nan_stops_every_rank_before_the_update_and_names_the_record(bad_rank: int) -> None:
    features = SECOND.image_features.clone()
    features[0, 0, 0] = float("nan")
    bad = dataclasses.replace(SECOND, image_features=features, record_ids=("set:bad",))
    good = dataclasses.replace(FIRST, record_ids=("set:a", "set:b", "set:c"))
    per_rank = [[bad], [good]] if bad_rank == 0 else [[good], [bad]]

    def train(rank: int, size: int) -> str:
        with pytest.raises(TrainingError) as error:
            _train(rank, per_rank)
        return str(error.value)

    for message in run_distributed(train, 2):
        assert message.startswith("step 1: the loss is not finite for 1 records: set:bad.")


def test_nan_in_the_share_of_one_context_parallel_rank_stops_both() -> None:
    features = FIRST.image_features.clone()
    features[0, 0, 0] = float("nan")
    batch = dataclasses.replace(FIRST, image_features=features, record_ids=("set:bad", "set:b", "set:c"))

    def train(rank: int, size: int) -> str:
        with pytest.raises(TrainingError) as error:
            _train(rank, [[batch]], context_parallel=size)
        return str(error.value)

    # Records in one tile of the attention kernel share its NaN, so others may be named beside it.
    first, second = run_distributed(train, 2)
    assert first == second
    assert first.startswith("step 1: the loss is not finite for")
    assert "set:bad" in first
