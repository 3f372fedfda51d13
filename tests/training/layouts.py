"""Trains the same tiny model on the same samples under any layout, for comparison with one process."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch._dynamo  # every optimizer imports it: once here instead of a second in each forked rank
from megatron.core import parallel_state

from parrot_sys.data.batch import PackedBatch
from parrot_sys.data.languages import MMMB_LANGUAGES
from parrot_sys.megatron.runtime.initialize import ParallelConfig, initialize
from parrot_sys.megatron.runtime.optimizer import build_optimizer, wrap_data_parallel
from parrot_sys.modules.gated_cross_attention import GatedCrossAttentionConfig
from parrot_sys.modules.lora import LoRAConfig
from parrot_sys.modules.perceiver import ResamplerConfig
from parrot_sys.modules.rotary import RopeScaling
from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.systems.build import build_chunks, build_model
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.export import export_released, released_tensors
from parrot_sys.systems.llava.config import LlavaConfig
from parrot_sys.systems.load import load_released
from parrot_sys.systems.multimodal_gpt.config import FlamingoConfig
from parrot_sys.systems.parts import set_trainable
from parrot_sys.systems.registry import part_of
from parrot_sys.systems.wings.config import WingsConfig
from parrot_sys.testing.distributed import run_distributed
from parrot_sys.training.step import StepRunner
from tests.megatron.parrot_reference import CONFIG, MIXED, Sample, V, make_batch
from tests.megatron.tiled_batches import tiled_micro_batches

MODEL = replace(
    CONFIG,
    vision=replace(CONFIG.vision, num_attention_heads=4),
    moe=TextGuidedMoEConfig(num_experts=4, ffn_hidden_size=20, aux_loss_coeff=0.1, z_loss_coeff=0.01),
    llm=replace(CONFIG.llm, num_layers=4),
)
"""Divisible by 2 and 4 where it can be cut; auxiliary losses are on."""
TOPK = replace(
    MODEL,
    moe=replace(
        MODEL.moe,
        routing="topk",
        topk=2,
        normalize_guidance=True,
        router_scale=2.0,
        router_scale_start=0.5,
        router_scale_steps=2,
        information_coeff=0.2,
        evenness_coeff=0.1,
        entropy_coeff=0.05,
        expert_bias=True,
        bias_update_rate=0.05,
    ),
)
"""With every switch of the router that changes what it learns."""
QWEN3 = replace(TOPK, llm=replace(MODEL.llm, family="qwen3", qkv_bias=False, head_dim=10))
LLAMA = replace(
    MODEL,
    llm=replace(
        MODEL.llm,
        family="llama",
        qkv_bias=False,
        rope_scaling=RopeScaling(factor=4.0, low_frequency=1.0, high_frequency=4.0, original_positions=32),
    ),
)
DINOV2 = replace(MODEL, vision=replace(MODEL.vision, type="dinov2", activation="gelu", layer_norm_eps=1e-6))
LORA = replace(
    MODEL, lora=LoRAConfig(rank=2, alpha=3.0, targets=("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"))
)
WINGS = replace(
    MODEL,
    moe=TextGuidedMoEConfig(num_experts=0),
    max_seq_len=64,
    wings=WingsConfig(rank=3, system_prompt_length=2, router_positions=64),
)
FLAMINGO = replace(
    MODEL,
    moe=TextGuidedMoEConfig(num_experts=0),
    lora=LoRAConfig(rank=2, alpha=3.0),
    flamingo=FlamingoConfig(
        resampler=ResamplerConfig(num_latents=3, num_layers=1, num_attention_heads=2, head_dim=5, ffn_multiplier=2),
        cross_attention=GatedCrossAttentionConfig(num_attention_heads=4, head_dim=6, ffn_multiplier=2),
        every_n_layers=2,
        media_rule="next",
        image_token_id=79,
    ),
)
"""All that can learn does: latents of 24 columns go through stages of 32, which they do not fill."""
LLAVA = replace(
    MODEL,
    vision=replace(MODEL.vision, select_feature="patch"),
    moe=TextGuidedMoEConfig(num_experts=0),
    llava=LlavaConfig(grids=((1, 2), (2, 1), (2, 2))),
)
"""Pictures of several sizes, cut into tiles."""
TIED = replace(MODEL, llm=replace(MODEL.llm, tie_word_embeddings=True))

ALL = {"vision": True, "projector": True, "moe": True, "llm": True}
LR = 1e-2


def layout(
    tensor: int = 1,
    pipeline: int = 1,
    chunks: int | None = None,
    context: int = 1,
    sequence: bool = False,
    experts: int = 1,
    expert_tensor: int | None = None,
    **sizes: Any,
) -> ParallelConfig:
    """A layout by short names; `chunks` are those of each pipeline rank."""
    return ParallelConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=chunks,
        context_parallel_size=context,
        sequence_parallel=sequence,
        expert_model_parallel_size=experts,
        expert_tensor_parallel_size=expert_tensor,
        **sizes,
    )


def micro_batches(pixels: bool, count: int = 4, rows_per_image: int = V) -> list[PackedBatch]:
    """A step: packed samples with one, no and two images; one long sample; text only; nothing."""
    batches = [
        make_batch(MIXED, pixels=pixels, seed=1, rows_per_image=rows_per_image),
        make_batch((Sample(prompt=4, images=1, answer=9),), pixels=pixels, seed=2, rows_per_image=rows_per_image),
        make_batch((Sample(prompt=4, images=0, answer=3), Sample(prompt=2, images=0, answer=5)), seed=3),
        PackedBatch.empty(),
    ]
    return batches[:count]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a layout trains to; tensors by their released names, whole."""

    losses: list[float]
    aux_losses: list[float]
    norms: list[float]
    gradients: dict[str, np.ndarray]
    """Those of the first step; none with the distributed optimizer, where each rank has those of its own share only."""
    parameters: dict[str, np.ndarray]
    metrics: list[float]


@contextmanager
def checkpoint(config: ParrotConfig) -> Iterator[Path]:
    """A released-layout checkpoint of `config` with random weights, from one process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"

        def write(rank: int, size: int) -> None:
            initialize(ParallelConfig())
            torch.manual_seed(11)
            model = build_model(config)
            for name, parameter in model.named_parameters():
                # Zero at the start: nothing would reach what comes before, or the gated blocks.
                if (part_of(name, config) == "lora" and name.endswith(".b")) or name.endswith("_up"):
                    torch.nn.init.normal_(parameter, std=0.1)
                elif name.endswith("_gate"):
                    torch.nn.init.normal_(parameter)
            export_released(model, path)

        run_distributed(write, 1)
        yield path


def train(
    config: ParrotConfig,
    parallel: ParallelConfig | None = None,
    *,
    data_parallel: int = 1,
    trainable: dict[str, bool] = ALL,
    steps: int = 3,
    sgd: bool = True,
    recompute: str = "none",
    distributed: bool = False,
    overlap: bool = False,
    reduction: Literal["global", "micro_batch"] = "global",
    num_batches: int = 4,
    bypass: tuple[str, ...] = (),
) -> Run:
    """`steps` steps under a layout; every rank must report the same losses, norms and metrics.

    Args:
        config: of the model.
        parallel: layout; one process when not given.
        data_parallel: copies of the model, which share the micro-batches.
        trainable: parts that learn; others are frozen.
        steps: all with the same samples.
        sgd: make Adam linear in the gradients (huge epsilon, no momentum), so that parameters can be compared: Adam
            itself turns rounding errors of tiny gradients into steps of full size.
        recompute: see `build_model`.
        distributed: use the distributed optimizer.
        overlap: reduce gradients while the backward pass runs.
        reduction: see `StepRunner`.
        num_batches: how many of `micro_batches` make a step.
        bypass: see `build_model`.
    """
    parallel = parallel or ParallelConfig()
    world_size = parallel.model_parallel_size * data_parallel
    with checkpoint(config) as path:
        settings = (trainable, steps, sgd, recompute, distributed, overlap, reduction, num_batches, bypass)
        runs = run_distributed(lambda rank, size: _train(config, parallel, path, *settings), world_size)
    first = runs[0]
    for run in runs[1:]:
        assert (run.losses, run.aux_losses, run.norms) == (first.losses, first.aux_losses, first.norms)
        assert run.metrics == first.metrics
    return first


def _train(
    config: ParrotConfig,
    parallel: ParallelConfig,
    path: Path,
    trainable: dict[str, bool],
    steps: int,
    sgd: bool,
    recompute: str,
    distributed: bool,
    overlap: bool,
    reduction: Literal["global", "micro_batch"],
    num_batches: int,
    bypass: tuple[str, ...],
) -> Run:
    initialize(parallel)
    chunks = build_chunks(config, parallel, recompute=recompute, bypass=bypass)
    for chunk in chunks:
        load_released(chunk, path)
    set_trainable(chunks, trainable)
    wrapped = wrap_data_parallel(chunks, distributed_optimizer=distributed, overlap=overlap)
    settings: dict[str, Any] = {"lr": LR * 1e3, "eps": 1e3, "betas": (0.0, 0.999)} if sgd else {"lr": LR}
    optimizer = build_optimizer(wrapped, clip_grad=1.0, **settings)
    for group in optimizer.param_groups:
        group["lr"] = group["max_lr"]
    runner = StepRunner(
        chunks=wrapped,
        device=torch.device("cpu"),
        num_experts=config.moe.num_experts,
        languages=MMMB_LANGUAGES,
        num_visual_rows=config.vision.num_visual_rows,
        reduction=reduction,
        optimizer=optimizer,
    )
    if config.llava is None:
        batches = micro_batches(trainable["vision"], num_batches, config.rows_per_image)
    else:
        batches = tiled_micro_batches(config, pixels=trainable["vision"], count=num_batches)
    mine = batches[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]
    losses, aux_losses, norms, gradients, metrics = [], [], [], {}, []
    for step in range(steps):
        result = runner.train(mine, step + 1)
        losses.append(result.metrics.loss)
        aux_losses.append(result.metrics.scalar("aux_loss"))
        norms.append(result.grad_norm)
        metrics = result.metrics.sums.tolist()
        if not step and not distributed:
            gradients = _whole(chunks, lambda parameter: getattr(parameter, "main_grad", None))
    return Run(
        losses=losses,
        aux_losses=aux_losses,
        norms=norms,
        gradients=gradients,
        parameters=_whole(chunks, lambda parameter: parameter),
        metrics=metrics,
    )


def _whole(chunks: Sequence[Any], value: Any) -> dict[str, np.ndarray]:
    return {name: tensor.detach().clone().numpy() for name, tensor in released_tensors(chunks, value=value)}


def assert_same(run: Run, reference: Run, *, tolerance: float = 1e-5) -> None:
    """Losses, norms, gradients and parameters within `tolerance` of the largest value of each tensor.

    Gradients that are zero but for rounding (biases of keys, say) are measured by the model's largest gradient, and
    parameters that only they have moved by the step that it makes.
    """
    for name in ("losses", "aux_losses", "norms"):
        np.testing.assert_allclose(
            getattr(run, name), getattr(reference, name), rtol=tolerance, err_msg=name, equal_nan=False
        )
    np.testing.assert_allclose(
        run.metrics, reference.metrics, rtol=tolerance, atol=1e-12, err_msg="metrics", equal_nan=False
    )
    scale = max(np.abs(gradient).max() for gradient in reference.gradients.values())
    for kind, floor in (("gradients", 1e-2 * scale), ("parameters", 1e-2 * LR * scale)):
        ours, theirs = getattr(run, kind), getattr(reference, kind)
        if kind == "gradients" and not ours:
            continue
        assert ours.keys() == theirs.keys()
        for name, wanted in theirs.items():
            error = np.abs(ours[name] - wanted).max(initial=0)
            bound = tolerance * max(np.abs(wanted).max(initial=0), floor)
            assert error <= bound, f"{kind} of {name}: error {error:.2e}, allowed {bound:.2e}"
