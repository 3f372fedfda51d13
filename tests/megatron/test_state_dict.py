"""Loading into sharded models and from bare parts (Qwen2, CLIP, SigLIP), and export of what was never released."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import parrot_sys
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.errors import CheckpointError
from parrot_sys.files import read_json
from parrot_sys.inference.model import ParrotForConditionalGeneration
from parrot_sys.megatron.checkpoint.store import load_model_weights, save_distributed
from parrot_sys.megatron.runtime.initialize import ParallelConfig, initialize, shutdown
from parrot_sys.megatron.state_dict import load_tower, model_tensors
from parrot_sys.megatron.vision import build_vision_tower
from parrot_sys.models.efficientnet import EfficientNetLite0
from parrot_sys.models.llm import llm_config_from_hf
from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.systems.build import build_model, config_of
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.export import export_released
from parrot_sys.systems.hf_config import config_from_hf
from parrot_sys.systems.load import load_released
from parrot_sys.testing.distributed import run_distributed
from parrot_sys.towers import VisionConfig, vision_config_from_hf

FIXTURE = Path(__file__).parents[1] / "fixtures" / "parrot_tiny"
PAD = 630


@pytest.fixture(autouse=True)
def _groups() -> Iterator[None]:
    shutdown()  # ranks are forked from this process, which must not hold groups of its own
    yield
    shutdown()


def _rank(
    rank: int, world_size: int, parallel: ParallelConfig, out: Path
) -> tuple[torch.Tensor, float, list[int], dict[str, torch.Tensor]]:
    model, _ = parrot_sys.load_pretrained(FIXTURE / "model", parallel=parallel)
    expected = load_file(FIXTURE / "expected.safetensors")
    ids, images, labels = (expected[f"batch0.{name}"] for name in ("input_ids", "images", "labels"))
    output = model(ids, ids != PAD, images, labels)
    output.loss.backward()
    case = json.loads((FIXTURE / "expected.json").read_text())["generate"][0]
    tokens = model.generate(torch.tensor([case["prompt_ids"]]), images=expected["pixel_values"][:1], max_new_tokens=4)
    export_released(model.model, out, source=model.source)
    folder = out.parent / "distributed"
    folder.mkdir(exist_ok=True)
    save_distributed(folder, [model.model], None, {"step": 0})
    name = "model.layers.0.self_attn.q_proj.weight"
    return (
        output.logits[0, :20].detach().numpy(),
        float(output.loss.detach()),
        tokens[0].tolist(),
        {name: model.hf_gradients()[name].numpy()},
    )


@pytest.mark.parametrize(
    ("ranks", "sizes"),
    [
        pytest.param(2, {"tensor_model_parallel_size": 2}, id="tp2-etp2"),
        pytest.param(2, {"expert_model_parallel_size": 2}, id="ep2"),
        pytest.param(4, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}, id="tp2-ep2-etp2"),
    ],
)
def test_ranks_that_share_the_model(ranks: int, sizes: dict[str, int], tmp_path: Path) -> None:
    expected = load_file(FIXTURE / "expected.safetensors")
    facts = json.loads((FIXTURE / "expected.json").read_text())
    wanted = expected["batch0.logits"][0, :20]
    for logits, loss, tokens, gradients in run_distributed(
        _rank, ranks, ParallelConfig(**sizes), tmp_path / "out", timeout=120
    ):
        assert (torch.from_numpy(logits) - wanted).abs().max() < 1e-4 * wanted.abs().max()
        assert abs(loss - facts["batches"][0]["loss"]) < 1e-4
        assert tokens == facts["generate"][0]["output_ids"][: len(tokens)]
        for name, gradient in gradients.items():
            reference = expected[f"batch0.grad.{name}"]
            assert (torch.from_numpy(gradient) - reference).abs().max() < 1e-3 * reference.abs().max()
    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(FIXTURE / "model" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    initialize()
    single = parrot_sys.load_pretrained(FIXTURE / "model")[0].model
    again = build_model(config_of(single))
    assert load_model_weights(tmp_path / "distributed", [again]) == {"step": 0}
    saved, released = model_tensors(again), model_tensors(single)
    assert saved.keys() == released.keys()
    assert all(torch.equal(saved[name], released[name]) for name in released)


def test_every_tensor_is_filled() -> None:
    """No parameter or buffer keeps what it had before."""
    initialize()
    config = config_from_hf(read_json(FIXTURE / "model" / "config.json"), FIXTURE / "model")
    model = build_model(config, initialize_weights=False)
    with torch.no_grad():
        for tensor in model_tensors(model).values():
            tensor.fill_(torch.nan)
    load_released(model, FIXTURE / "model")
    assert not [name for name, tensor in model_tensors(model).items() if tensor.isnan().any()]


def test_start_from_a_bare_language_model(tmp_path: Path) -> None:
    """Stage 1: decoder from Qwen2, tower from CLIP, projector and experts new."""
    initialize()
    torch.manual_seed(0)
    qwen = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=40,
            vocab_size=90,
        )
    )
    qwen.save_pretrained(tmp_path / "qwen")
    llm = llm_config_from_hf(read_json(tmp_path / "qwen" / "config.json"))
    vision = vision_config_from_hf(
        read_json(FIXTURE / "clip-vit-tiny" / "config.json"), path=str(FIXTURE / "clip-vit-tiny")
    )
    config = ParrotConfig(llm=llm, vision=vision, moe=TextGuidedMoEConfig(num_experts=2, ffn_hidden_size=8))
    model = build_model(config)
    before = {name: tensor.detach().clone() for name, tensor in model_tensors(model).items()}
    load_released(model, tmp_path / "qwen")
    new = {name for name, tensor in model_tensors(model).items() if torch.equal(tensor, before[name])}
    ones = {
        name for name in new if "layernorm" in name or name.endswith("bias")
    }  # norms and biases start as they are there
    assert {name.split(".")[0] for name in new - ones} == {"projector", "moe"}
    ids = torch.randint(0, 90, (1, 7))
    from parrot_sys.inference.model import ParrotForConditionalGeneration

    logits = ParrotForConditionalGeneration(model)(ids).logits
    assert (logits - qwen(ids).logits).abs().max() < 1e-5


def test_towers_from_their_own_directories(tmp_path: Path) -> None:
    """A whole CLIP holds a text half, SigLIP a pooling head: both are passed over."""
    initialize()
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "image_size": 28,
        "patch_size": 14,
    }
    clip = CLIPModel(
        CLIPConfig(
            vision_config=sizes,
            text_config={"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16},
        )
    )
    siglip = SiglipVisionModel(SiglipVisionConfig(**sizes))
    dinov2 = Dinov2Model(Dinov2Config(**{k: v for k, v in sizes.items() if k != "intermediate_size"}, mlp_ratio=2))
    with torch.no_grad():
        for parameter in dinov2.parameters():  # scales are one at the start
            parameter.add_(0.1 * torch.randn_like(parameter))
    for name, model, reference in (
        ("clip", clip, clip.vision_model),
        ("siglip", siglip, siglip),
        ("dinov2", dinov2, dinov2),
    ):
        model.save_pretrained(tmp_path / name)
        config = vision_config_from_hf(read_json(tmp_path / name / "config.json"), path=str(tmp_path / name))
        assert config.type == name
        tower = build_vision_tower(config)
        load_tower(tower, config)
        pixels = torch.randn(2, 3, 28, 28)
        wanted = reference(pixels, output_hidden_states=True).hidden_states[-2]
        assert (tower(pixels)[:, -wanted.shape[1] :] - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_tower_that_is_nowhere_or_wrong(tmp_path: Path) -> None:
    initialize()
    config = VisionConfig(
        image_size=14, hidden_size=24, num_layers=1, num_attention_heads=3, ffn_hidden_size=32, select_layer=-1
    )
    with pytest.raises(CheckpointError, match=r"set model\.vision\.path"):
        load_tower(build_vision_tower(config), config)
    save_file({"vision_model.embeddings.class_embedding": torch.zeros(25)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"class_embedding: wanted \[24\], got \[25\]"):
        load_tower(build_vision_tower(config), config, tmp_path)


def test_export_of_a_model_with_efficientnet(tmp_path: Path) -> None:
    """A model that was trained here: everything inside one directory, all settings and tensors come back."""
    initialize()
    torch.manual_seed(1)
    tokenizer = ParrotProcessor.from_pretrained(FIXTURE / "model").tokenizer
    vision = VisionConfig(type="efficientnet_lite0", image_size=64, hidden_size=1280, activation="relu6")
    llm = dataclasses.replace(
        config_from_hf(read_json(FIXTURE / "model" / "config.json"), FIXTURE / "model").llm, num_query_groups=2
    )
    moe = TextGuidedMoEConfig(
        num_experts=3, ffn_hidden_size=8, routing="topk", topk=2, residual="paper", residual_weight=0.5
    )
    config = ParrotConfig(vision=vision, llm=llm, moe=moe, max_seq_len=128)
    model = build_model(config)
    load_tower(model.vision_tower, vision)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    processor = ParrotProcessor.for_tower(tmp_path / "tokenizer", "efficientnet_lite0", 64)
    export_released(model, tmp_path / "out", save_processor=processor.save_pretrained)
    loaded, again = parrot_sys.load_pretrained(tmp_path / "out")
    assert loaded.config == config
    assert again.image_processor == processor.image_processor
    ours, theirs = model_tensors(loaded.model), model_tensors(model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert any(key.startswith("model.vision_tower.vision_tower.") for key in loaded.hf_state_dict())
    package = EfficientNetLite0.from_package().state_dict()
    assert all(torch.equal(loaded.model.vision_tower.state_dict()[name], tensor) for name, tensor in package.items())


def _stage(rank: int, world_size: int, tied: bool) -> dict[str, np.ndarray]:
    parallel = initialize(ParallelConfig(pipeline_model_parallel_size=2))
    config = config_from_hf(read_json(FIXTURE / "model" / "config.json"), FIXTURE / "model")
    config = dataclasses.replace(config, llm=dataclasses.replace(config.llm, tie_word_embeddings=tied))
    model = build_model(config, parallel, initialize_weights=False)
    load_released(model, FIXTURE / "model")
    return {name: tensor.detach().numpy() for name, tensor in model_tensors(model).items()}


@pytest.mark.parametrize("tied", [False, True])
def test_pipeline_stages_hold_their_layers(tied: bool) -> None:
    """Layers are numbered over the whole model; with tied embeddings the last stage holds a copy of them."""
    stages = run_distributed(_stage, 2, tied, timeout=120)
    initialize()
    model = parrot_sys.load_pretrained(FIXTURE / "model")[0].model
    whole = {name: tensor.detach().numpy() for name, tensor in model_tensors(model).items()}
    assert any("layers.0." in name for name in stages[0])
    assert any("layers.1." in name for name in stages[1])
    head = {"decoder.output_layer.weight"}
    assert stages[0].keys() | stages[1].keys() == (whole.keys() - head if tied else whole.keys())
    both = {"decoder.embedding.word_embeddings.weight"} if tied else set()
    assert stages[0].keys() & stages[1].keys() == both
    for stage in stages:
        for name, values in stage.items():
            assert np.array_equal(values, whole[name]), name


def test_first_stage_checkpoints_keep_going_past_their_experts(tmp_path: Path) -> None:
    """Experts of a model that does not use them yet are written, and the next stage finds them."""
    model, _ = parrot_sys.load_pretrained(FIXTURE / "model")
    bypassed = build_model(model.config, bypass=("moe",))
    bypassed.load_state_dict(model.model.state_dict())
    model = ParrotForConditionalGeneration(bypassed, source=model.source)
    ids, images = torch.tensor([[5, -200, 6]]), torch.randn(1, 3, 56, 56)
    wanted = model(ids, images=images).logits
    export_released(model.model, tmp_path / "out", source=model.source)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["use_moe"] is False
    first, _ = parrot_sys.load_pretrained(tmp_path / "out")
    assert torch.equal(first(ids, images=images).logits, wanted)
    second = build_model(model.config)
    load_released(second, tmp_path / "out")
    assert torch.equal(second.moe.w_gate_up, model.model.moe.w_gate_up)


def test_export_of_a_model_with_its_own_clip(tmp_path: Path) -> None:
    """The tower's configuration goes along, so that the result needs no other directory."""
    initialize()
    hf = read_json(FIXTURE / "model" / "config.json")
    released = config_from_hf(hf, FIXTURE / "model")
    assert released.vision.path is not None
    config = dataclasses.replace(released, moe=TextGuidedMoEConfig(num_experts=2, ffn_hidden_size=8, topk=1))
    model = build_model(config)
    load_tower(model.vision_tower, config.vision)
    processor = ParrotProcessor.from_pretrained(FIXTURE / "model")
    export_released(model, tmp_path / "out", save_processor=processor.save_pretrained)
    written = read_json(tmp_path / "out" / "config.json")
    assert (written["mm_vision_tower"], written["image_aspect_ratio"]) == ("vision_tower", "pad")
    loaded, again = parrot_sys.load_pretrained(tmp_path / "out")
    vision = dataclasses.replace(config.vision, path=str(tmp_path / "out" / "vision_tower"))
    assert loaded.config == dataclasses.replace(config, vision=vision)
    assert again.image_processor == processor.image_processor
    ours, theirs = model_tensors(loaded.model), model_tensors(model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
