"""A run goes on under another layout: the same losses, and the same weights in the end."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import parrot_sys
from parrot_sys.data.constants import IMAGE_TOKEN_ID
from parrot_sys.megatron.runtime.initialize import ParallelConfig
from parrot_sys.models.llm import TokenExpertsConfig
from parrot_sys.models.lora_maps import is_lora
from parrot_sys.modules.gated_cross_attention import GatedCrossAttentionConfig
from parrot_sys.modules.lora import LoRAConfig
from parrot_sys.modules.perceiver import ResamplerConfig
from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.systems.llava.config import LlavaConfig
from parrot_sys.systems.multimodal_gpt.config import FlamingoConfig
from parrot_sys.systems.wings.config import WingsConfig
from parrot_sys.testing.distributed import run_distributed
from parrot_sys.training.config import CheckpointConfig, OptimizerConfig, TrainConfig
from parrot_sys.training.trainer import Trainer
from parrot_sys.training.writer import read_metrics
from tests.training.tiny import MODEL, signal_before, tiny_config

ONE = ParallelConfig()
TP2 = ParallelConfig(tensor_model_parallel_size=2)
PP2 = ParallelConfig(pipeline_model_parallel_size=2)
TP2_PP2 = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True)
EP2 = ParallelConfig(expert_model_parallel_size=2)
TP2_EP2 = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, expert_model_parallel_size=2)
TP2_EP2_PP2 = ParallelConfig(
    tensor_model_parallel_size=2,
    sequence_parallel=True,
    pipeline_model_parallel_size=2,
    expert_model_parallel_size=2,
    expert_tensor_parallel_size=1,
)
CP2 = ParallelConfig(context_parallel_size=2)
VPP = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)


def _config(folder: Path, output: str, parallel: ParallelConfig = ONE, *, distributed: bool = False) -> TrainConfig:
    base = tiny_config(folder, output=output)
    # Four layers, so that there is something to interleave; they start from random weights, the same in every run.
    model = dataclasses.replace(
        base.model, llm=dataclasses.replace(base.model.llm, num_layers=4), tokenizer_path=str(MODEL)
    )
    # Adam takes a step of full size on gradients that are nothing but rounding; a large epsilon makes it look at sizes.
    optimizer = OptimizerConfig(lr=1e-1, eps=1e-2, distributed=distributed)
    start = folder / "start" / "hf"
    checkpoint = CheckpointConfig(interval=3, load_from=str(start) if start.is_dir() else None, export=True)
    return dataclasses.replace(
        base, model=model, parallel=parallel, optimizer=optimizer, checkpoint=checkpoint, max_steps=6
    )


def _train(config: TrainConfig, ranks: int, *, stop_at: int | None = None) -> None:
    def rank_main(rank: int, size: int) -> None:
        trainer = Trainer(config)
        if stop_at is not None:
            signal_before(stop_at, signal.SIGTERM)(trainer)
        trainer.run()

    run_distributed(rank_main, ranks, timeout=120)


@pytest.mark.parametrize(
    ("before", "after", "distributed"),
    [
        pytest.param((PP2, 2), (ONE, 1), False, id="pp2-one", marks=pytest.mark.slow),
        pytest.param((ONE, 1), (TP2_PP2, 4), True, id="one-tp2-sp-pp2-zero1"),
        pytest.param((TP2, 2), (VPP, 2), False, id="tp2-vpp2", marks=pytest.mark.slow),
        pytest.param((VPP, 2), (ONE, 4), True, id="vpp2-dp4-zero1", marks=pytest.mark.slow),
        pytest.param((EP2, 2), (TP2_EP2, 4), False, id="ep2-tp2-sp-ep2-etp2"),
        pytest.param((EP2, 2), (ONE, 1), False, id="ep2-one", marks=pytest.mark.slow),
        pytest.param((ONE, 1), (EP2, 4), True, id="one-ep2-dp2-zero1"),
    ],
)
def test_goes_on_under_another_layout(
    before: tuple[ParallelConfig, int], after: tuple[ParallelConfig, int], distributed: bool, tmp_path: Path
) -> None:
    _goes_on(tmp_path, before, after, distributed=distributed)


def test_lora_goes_on_under_another_layout(tmp_path: Path) -> None:
    """Only the updates learn."""
    lora = LoRAConfig(rank=4, targets=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"))
    names = _goes_on(tmp_path, (TP2_PP2, 4), (VPP, 2), distributed=True, lora=lora)
    assert any(is_lora(name) for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [None, (0, 3)], ids=["all-layers", "some-layers"])
def test_wings_goes_on_under_another_layout(layers: tuple[int, ...] | None, tmp_path: Path) -> None:
    wings = WingsConfig(rank=4, layers=layers, router_positions=512)
    names = _goes_on(tmp_path, (TP2_PP2, 4), (VPP, 2), distributed=True, wings=wings)
    assert any(".attn_t_pool." in name for name in names)


@pytest.mark.slow
def test_gated_blocks_go_on_under_another_layout(tmp_path: Path) -> None:
    """Layers with and without a block, and updates beside its linear layers; everything learns."""
    flamingo = FlamingoConfig(
        resampler=ResamplerConfig(num_latents=4, num_layers=1, num_attention_heads=2, head_dim=8),
        cross_attention=GatedCrossAttentionConfig(num_attention_heads=4, head_dim=6, ffn_multiplier=2),
        every_n_layers=2,
        image_token_id=1,
    )
    changes = {"flamingo": flamingo, "moe": TextGuidedMoEConfig(num_experts=0), "lora": LoRAConfig(rank=4)}
    names = _goes_on(tmp_path, (TP2_PP2, 4), (VPP, 2), distributed=True, everything=changes)
    assert any(".gated_cross_attn_layer.attn.to_kv.lora_B" in name for name in names)


@pytest.mark.slow
def test_tiles_go_on_under_another_layout(tmp_path: Path) -> None:
    """The newline row is on the first stage alone."""
    changes = {
        "vision": dataclasses.replace(_config(tmp_path, "any").model.vision, select_feature="patch"),
        "llava": LlavaConfig(grids=((1, 2), (2, 1))),
        "moe": TextGuidedMoEConfig(num_experts=0),
    }
    names = _goes_on(tmp_path, (TP2_PP2, 4), (VPP, 2), distributed=True, everything=changes)
    assert {"image_newline", "multi_modal_projector.linear_2.weight"} <= names


@pytest.mark.slow
def test_token_experts_go_on_under_another_layout(tmp_path: Path) -> None:
    """Layers with experts and without, beside Parrot's own."""
    llm = _config(tmp_path, "any").model.llm
    experts = TokenExpertsConfig(num_experts=4, topk=2, ffn_hidden_size=24, sparse_step=2)
    routed = dataclasses.replace(llm, family="qwen3_moe", qkv_bias=False, experts=experts)
    names = _goes_on(tmp_path, (EP2, 2), (TP2_EP2_PP2, 4), distributed=True, everything={"llm": routed})
    assert any(name.endswith("layers.3.mlp.experts.3.down_proj.weight") for name in names)


def _goes_on(
    tmp_path: Path,
    before: tuple[ParallelConfig, int],
    after: tuple[ParallelConfig, int],
    *,
    distributed: bool,
    lora: LoRAConfig | None = None,
    wings: WingsConfig | None = None,
    everything: dict[str, Any] | None = None,
) -> set[str]:
    """Names of the tensors that are the same in the end."""

    def config(output: str, parallel: ParallelConfig = ONE) -> TrainConfig:
        base = _config(tmp_path, output, parallel, distributed=distributed)
        if everything is not None:
            return dataclasses.replace(base, model=dataclasses.replace(base.model, **everything))
        if wings is not None:
            plain = dataclasses.replace(base.model.moe, num_experts=0)
            return dataclasses.replace(base, model=dataclasses.replace(base.model, moe=plain, wings=wings))
        if lora is None:
            return base
        frozen = {"lora": True, "others": False}
        return dataclasses.replace(base, model=dataclasses.replace(base.model, lora=lora), trainable=frozen)

    _train(dataclasses.replace(config("start"), max_steps=1), 1)
    _train(config("whole"), 1)
    _train(config("moved", before[0]), before[1], stop_at=3)
    _train(config("moved", after[0]), after[1])
    losses = [[record["loss"] for record in read_metrics(tmp_path / run, "train")] for run in ("whole", "moved")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    ours, theirs = (load_file(tmp_path / run / "hf" / "model.safetensors") for run in ("moved", "whole"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, rtol=1e-4, atol=1e-5), name
    return set(theirs)


@pytest.mark.parametrize(
    "parallel", [pytest.param(VPP, id="vpp2"), pytest.param(CP2, id="cp2", marks=pytest.mark.slow)]
)
def test_answers_from_a_checkpoint_of_a_layout_that_no_server_has(parallel: ParallelConfig, tmp_path: Path) -> None:
    """They are those of the exported model."""
    config = _config(tmp_path, "run", parallel)
    _train(dataclasses.replace(config, max_steps=2), 2)
    prompt = torch.tensor([[5, 9, IMAGE_TOKEN_ID, 40, 41]])
    pixels = torch.randn(1, 3, *[config.model.vision.image_size] * 2, generator=torch.Generator().manual_seed(0))

    def answer(rank: int, size: int, folder: Path) -> Tensor:
        model, _ = parrot_sys.load_pretrained(folder)
        return model.generate(prompt, images=pixels, max_new_tokens=12)

    ours, exported = (run_distributed(answer, 1, tmp_path / folder)[0] for folder in ("run", "run/hf"))
    assert torch.equal(ours, exported)


@pytest.mark.parametrize(("parallel", "restored"), [(ONE, True), (TP2, False)], ids=["same", "tp2"])
def test_random_numbers_go_on_on_the_same_layout_only(parallel: ParallelConfig, restored: bool, tmp_path: Path) -> None:
    """Tensor-parallel ranks must draw alike, data-parallel ones had drawn different numbers."""

    def rank_main(rank: int, size: int, config: TrainConfig, drawn: int) -> tuple[Tensor, Tensor]:
        trainer = Trainer(config)
        torch.rand(drawn * (1 + rank))
        before = torch.get_rng_state()
        trainer.run()
        return before, torch.get_rng_state()

    first = dataclasses.replace(_config(tmp_path, "run"), max_steps=1)
    saved = run_distributed(rank_main, 2, first, 7)
    then = dataclasses.replace(first, parallel=parallel)
    states = [before for before, _ in run_distributed(rank_main, 2, then, 0)]
    assert torch.equal(*states) == (not restored)
    if restored:
        assert all(torch.equal(state, after) for state, (_, after) in zip(states, saved, strict=True))
