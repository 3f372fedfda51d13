"""LoRA in the decoder: outputs and gradients against plain PyTorch, merging, loading, sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM

from parrot_sys.errors import CheckpointError
from parrot_sys.megatron.checkpoint.store import load_model_weights, save_distributed
from parrot_sys.megatron.lora import merge_lora, merged_lora, unmerge_lora
from parrot_sys.megatron.model import MultimodalModel
from parrot_sys.megatron.runtime.initialize import initialize, shutdown
from parrot_sys.models.llm import LLMConfig
from parrot_sys.models.lora_maps import is_lora
from parrot_sys.modules.lora import LoRAConfig
from parrot_sys.systems.build import build_model, config_of
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.export import export_released, released_tensors
from parrot_sys.systems.hf_config import config_from_hf, read_json
from parrot_sys.systems.load import load_released
from parrot_sys.systems.parts import part_parameters, set_trainable
from tests.comparisons import differ
from tests.megatron.decoder_reference import build_reference
from tests.megatron.parrot_reference import CONFIG, MIXED, make_batch, reference_logits

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WITH = replace(CONFIG, lora=LoRAConfig(rank=3, alpha=5.0, targets=LAYERS))


@pytest.fixture(autouse=True)
def _groups() -> Iterator[None]:
    initialize()
    yield
    shutdown()


def _model(config: ParrotConfig = WITH, **settings: object) -> MultimodalModel:
    """A model whose updates are not zero."""
    torch.manual_seed(3)
    model = build_model(config, with_vision_tower=False, **settings)
    for parameter in part_parameters(model)["lora"]:
        nn.init.normal_(parameter, std=0.3)
    return model


def _add_update(layer: nn.Linear, a: Tensor, b: Tensor, scale: float) -> None:
    layer.register_forward_hook(lambda _, rows, output: output + scale * ((rows[0] @ a.T) @ b.T))


def _reference(model: MultimodalModel) -> tuple[Qwen2ForCausalLM, dict[str, Tensor]]:
    """Transformers' decoder with the model's weights and updates; and all of these by released name."""
    config = config_of(model)
    state = {name: tensor.detach().clone() for name, tensor in released_tensors(model)}
    reference = build_reference(config.llm)
    names = dict(reference.named_parameters())
    reference.load_state_dict({name: state[name] for name in reference.state_dict()})
    updates = {name: state[name].requires_grad_() for name in state if is_lora(name)}
    for name in [name for name in updates if name.endswith("lora_A.weight")]:
        layer = name.removesuffix(".lora_A.weight")
        b = updates[f"{layer}.lora_B.weight"]
        assert config.lora is not None
        _add_update(reference.get_submodule(layer), updates[name], b, config.lora.alpha / config.lora.rank)
    return reference, names | updates


@pytest.mark.parametrize(
    "targets", [LAYERS, ("k_proj", "down_proj"), ("q_proj", "v_proj", "up_proj")], ids=lambda names: "-".join(names)
)
def test_losses_and_gradients_are_those_of_plain_pytorch(targets: tuple[str, ...]) -> None:
    model = _model(replace(CONFIG, lora=LoRAConfig(rank=3, alpha=5.0, targets=targets)))
    batch = make_batch(MIXED)
    reference, tensors = _reference(model)
    logits = reference_logits(reference, model, batch, batch.image_features)
    rows = batch.label_rows
    expected = F.cross_entropy(logits[rows].double(), batch.labels[rows], reduction="none")
    expected.sum().backward()
    model.zero_grad()
    losses = model(batch).losses
    losses.sum().backward()
    torch.testing.assert_close(losses, expected.float(), rtol=1e-5, atol=1e-6)
    gradients = dict(released_tensors(model, value=lambda parameter: parameter.grad))
    assert {name for name in gradients if is_lora(name)} == {name for name in tensors if is_lora(name)}
    assert len([name for name in tensors if is_lora(name)]) == 2 * len(targets) * CONFIG.llm.num_layers
    scale = max(tensor.grad.abs().max() for tensor in tensors.values())
    for name, tensor in tensors.items():
        error = (gradients[name] - tensor.grad).abs().max()
        assert error <= 1e-5 * max(tensor.grad.abs().max(), 1e-2 * scale), name


def test_recomputed_layers_learn_behind_frozen_ones() -> None:
    batch = make_batch(MIXED)
    gradients = []
    for recompute in ("none", "full"):
        model = _model(recompute=recompute)
        set_trainable(model, {"projector": False, "moe": False, "llm": False})
        model(batch).losses.sum().backward()
        assert all(p.grad is None for part in ("projector", "moe", "llm") for p in part_parameters(model)[part])
        gradients.append([p.grad for p in part_parameters(model)["lora"]])
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_changes_nothing_but_rounding_and_is_undone_bit_for_bit(dtype: torch.dtype) -> None:
    model = _model(dtype=dtype).eval()
    batch = make_batch(MIXED)
    before = {name: tensor.clone() for name, tensor in released_tensors(model)}
    logits = model(batch, mode="logits").logits
    with merged_lora(model):
        merged = dict(released_tensors(model))
        assert set(merged) == {name for name in before if not is_lora(name)}
        for name in ("model.layers.1.self_attn.k_proj", "model.layers.0.mlp.up_proj"):
            a, b = (before[f"{name}.lora_{which}.weight"].double() for which in "AB")
            exact = before[f"{name}.weight"].double() + 5.0 / 3.0 * (b @ a)
            error = (merged[f"{name}.weight"].double() - exact).abs().max()
            assert error <= 2 * torch.finfo(dtype).eps * exact.abs().max(), name
        if dtype == torch.float32:  # in bf16 the merged weight itself is rounded
            torch.testing.assert_close(model(batch, mode="logits").logits, logits, rtol=1e-5, atol=1e-5)
    after = dict(released_tensors(model))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(model(batch, mode="logits").logits, logits)


def test_merging_twice_is_merging_once() -> None:
    model = _model()
    before = {name: tensor.clone() for name, tensor in released_tensors(model)}
    merge_lora(model)
    once = {name: tensor.clone() for name, tensor in released_tensors(model)}
    merge_lora(model)
    assert all(torch.equal(tensor, once[name]) for name, tensor in released_tensors(model))
    unmerge_lora(model)
    unmerge_lora(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in released_tensors(model))


def test_released_layout_keeps_updates_and_settings(tmp_path: Path) -> None:
    model = _model()
    export_released(model, tmp_path / "with")
    config = config_from_hf(read_json(tmp_path / "with" / "config.json"), tmp_path / "with")
    assert config.lora == WITH.lora
    again = build_model(config, with_vision_tower=False)
    load_released(again, tmp_path / "with")
    expected = dict(released_tensors(model))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in released_tensors(again))

    merge_lora(model)
    export_released(model, tmp_path / "merged")
    plain = config_from_hf(read_json(tmp_path / "merged" / "config.json"), tmp_path / "merged")
    assert plain.lora is None
    merged = build_model(plain, with_vision_tower=False)
    load_released(merged, tmp_path / "merged")
    batch = make_batch(MIXED)
    assert torch.equal(merged(batch, mode="logits").logits, model(batch, mode="logits").logits)

    with pytest.raises(CheckpointError, match=r"lora_A\.weight"):
        load_released(build_model(CONFIG, with_vision_tower=False), tmp_path / "with")
    start = build_model(WITH, with_vision_tower=False)
    load_released(start, tmp_path / "merged")  # updates start at zero
    assert torch.equal(start(batch, mode="logits").logits, merged(batch, mode="logits").logits)


def test_training_checkpoints_with_and_without(tmp_path: Path) -> None:
    merged = _model()
    merge_lora(merged)
    for name, model in (("with", _model()), ("without", merged)):
        (tmp_path / name).mkdir()
        save_distributed(tmp_path / name, [model], None, {})
    model, batch = _model(), make_batch(MIXED)
    again = build_model(WITH, with_vision_tower=False)
    load_model_weights(tmp_path / "with", [again])
    expected = dict(released_tensors(model))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in released_tensors(again))

    start = build_model(WITH, with_vision_tower=False)
    load_model_weights(tmp_path / "without", [start])  # updates start at zero
    plain = build_model(CONFIG, with_vision_tower=False)
    load_model_weights(tmp_path / "without", [plain])
    assert torch.equal(start(batch, mode="logits").logits, merged(batch, mode="logits").logits)
    assert torch.equal(plain(batch, mode="logits").logits, merged(batch, mode="logits").logits)
    with pytest.raises(CheckpointError, match=r"has LoRA, the model has none: set model\.lora"):
        load_model_weights(tmp_path / "with", [plain])


def test_dropout_thins_the_updates_inputs_in_training_only() -> None:
    model = _model(replace(CONFIG, lora=LoRAConfig(rank=3, dropout=0.5)))
    batch = make_batch(MIXED)
    model.train()
    assert differ(model(batch, mode="logits").logits, model(batch, mode="logits").logits)
    model.eval()
    assert torch.equal(model(batch, mode="logits").logits, model(batch, mode="logits").logits)


def test_size_in_the_language_model_of_multimodal_gpt_9b() -> None:
    # LLaMA-7B; of the 23,461,888 trainable parameters 6,684,672 lie in the eight gated cross-attention blocks.
    llama = LLMConfig(
        hidden_size=4096,
        num_layers=32,
        num_attention_heads=32,
        num_query_groups=32,
        ffn_hidden_size=11008,
        vocab_size=32003,
        qkv_bias=False,
    )
    model = build_model(replace(CONFIG, llm=llama, lora=LoRAConfig()), device="meta", with_vision_tower=False)
    assert sum(p.numel() for p in part_parameters(model)["lora"]) == 23_461_888 - 8 * 835_584
