"""LLaVA and LLaVA-NeXT: logits, gradients, greedy tokens and files are those of transformers' own models."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
    SiglipVisionConfig,
)

from parrot_sys.cli import list_presets
from parrot_sys.config_values import config_from_dict, read_yaml
from parrot_sys.data.constants import IGNORE_ID, IMAGE_TOKEN_ID
from parrot_sys.data.images import ImageProcessor
from parrot_sys.data.picture import Picture
from parrot_sys.errors import CheckpointError, ConfigError
from parrot_sys.files import read_json
from parrot_sys.inference.model import ParrotForConditionalGeneration
from parrot_sys.megatron.runtime.initialize import initialize, shutdown
from parrot_sys.systems.build import build_model, config_of
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.export import ReleasedSource, export_released
from parrot_sys.systems.hf_config import config_from_hf, config_to_hf
from parrot_sys.systems.load import load_released
from parrot_sys.systems.registry import SYSTEMS
from parrot_sys.towers import PictureRows

TILE, TOKEN = 28, 90
GRIDS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
}
SCALED = {
    "rope_theta": 500.0,
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {**TEXT, "rope_parameters": SCALED},
    "qwen2": {**TEXT, "tie_word_embeddings": True},
    "qwen3": {**TEXT, "head_dim": 8},
    "qwen3_moe": {**TEXT, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}
TOWER: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": TILE,
    "patch_size": 7,
}
TOWERS: dict[str, Callable[[], Any]] = {
    "clip": lambda: CLIPVisionConfig(**TOWER),
    "siglip": lambda: SiglipVisionConfig(**TOWER, vision_use_head=False),
}
CASES = [
    pytest.param("llava", "llama", "clip", "default", id="1.5-llama"),
    pytest.param("llava", "qwen3", "clip", "full", id="1.5-qwen3-full", marks=pytest.mark.slow),
    pytest.param("llava_next", "qwen3", "clip", "default", id="next-qwen3", marks=pytest.mark.slow),
    pytest.param("llava_next", "llama", "siglip", "full", id="next-llama-siglip"),
    pytest.param("llava", "qwen2", "siglip", "full", id="1.5-qwen2-tied-siglip", marks=pytest.mark.slow),
    pytest.param("llava_next", "qwen3_moe", "clip", "default", id="next-qwen3-moe"),
]
SIZES = [(40, 90), (90, 40), (30, 30), (200, 20)]
"""Height and width of the pictures: two in the first sample, one in the second and in the third."""


@pytest.fixture(autouse=True)
def _groups() -> Iterator[None]:
    initialize()
    yield
    shutdown()


def build_reference(kind: str, decoder: str, tower: str, strategy: str) -> PreTrainedModel:
    """transformers' model with random weights, in evaluation mode."""
    settings: dict[str, Any] = {
        "vision_config": TOWERS[tower](),
        "text_config": AutoConfig.for_model(decoder, **DECODERS[decoder]),
        "image_token_index": TOKEN,
        "vision_feature_select_strategy": strategy,
    }
    torch.manual_seed(3)
    if kind == "llava":
        model: PreTrainedModel = LlavaForConditionalGeneration(LlavaConfig(**settings))
    else:
        model = LlavaNextForConditionalGeneration(LlavaNextConfig(**settings, image_grid_pinpoints=GRIDS))
    for parameter in model.parameters():  # zeros and ones would hide an exchange
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def load(folder: Path) -> ParrotForConditionalGeneration:
    """Our model from files."""
    hf = read_json(folder / "config.json")
    model = build_model(config_from_hf(hf, folder))
    load_released(model, folder)
    return ParrotForConditionalGeneration(model, source=ReleasedSource(directory=folder, hf=hf, keep_dtypes=True))


@dataclass(frozen=True)
class Inputs:
    """The same three samples for both."""

    ids: Tensor
    mask: Tensor
    labels: Tensor
    pictures: list[Picture]
    theirs: dict[str, Tensor]
    their_labels: Tensor


def make_inputs(model: ParrotForConditionalGeneration) -> Inputs:
    """Samples with two pictures, one and one, and pixels from our own preprocessing."""
    tiling, rows = model.config.tiling, model.config.rows_per_image
    processor = ImageProcessor.for_tower("clip", TILE)
    pictures = []
    for number, (height, width) in enumerate(SIZES):
        noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        if tiling is None:
            pictures.append(Picture(torch.from_numpy(processor(Image.fromarray(noise)))[None], PictureRows.whole(rows)))
        else:
            pixels, size = processor.tiles(Image.fromarray(noise), tiling)
            pictures.append(Picture(torch.from_numpy(pixels), tiling.rows(*size)))
    marked = [[5, -200, 7, 8, -200, 9, 11], [-200, 3, 4, 12], [6, 13, -200, 2, 1]]
    expanded, counts = [], iter(len(picture.rows.source) for picture in pictures if picture.rows)
    for ids in marked:
        expanded.append([t for i in ids for t in ([TOKEN] * next(counts) if i == IMAGE_TOKEN_ID else [i])])
    theirs = {"input_ids": pad(expanded, 0), "attention_mask": pad([[1] * len(ids) for ids in expanded], 0)}
    most = max(len(picture.pixel_values) for picture in pictures)
    tiles = [torch.nn.functional.pad(p.pixel_values, (0,) * 7 + (most - len(p.pixel_values),)) for p in pictures]
    theirs["pixel_values"] = torch.stack(tiles) if tiling else torch.cat([p.pixel_values for p in pictures])
    if tiling:
        theirs["image_sizes"] = torch.tensor(SIZES)
    ids = pad(marked, 0)
    mask = pad([[1] * len(each) for each in marked], 0)
    labels = ids.masked_fill((ids == IMAGE_TOKEN_ID) | (mask == 0), IGNORE_ID)
    plain = theirs["input_ids"]
    their_labels = plain.masked_fill((plain == TOKEN) | (theirs["attention_mask"] == 0), IGNORE_ID)
    return Inputs(ids, mask, labels, pictures, theirs, their_labels)


def pad(rows: list[list[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def relative(got: Tensor, wanted: Tensor) -> float:
    return float(((got - wanted).abs().max() / wanted.abs().max()).detach())


@pytest.mark.parametrize(("kind", "decoder", "tower", "strategy"), CASES)
def test_logits_gradients_and_greedy_tokens_are_those_of_transformers(
    kind: str, decoder: str, tower: str, strategy: str, tmp_path: Path
) -> None:
    reference = build_reference(kind, decoder, tower, strategy)
    reference.save_pretrained(tmp_path)
    ours = load(tmp_path)
    assert (ours.config.tiling is not None) == (kind == "llava_next")
    inputs = make_inputs(ours)
    wanted = reference(**inputs.theirs, labels=inputs.their_labels)
    got = ours(inputs.ids, inputs.mask, inputs.pictures, inputs.labels)
    kept = inputs.theirs["attention_mask"].bool()
    assert relative(got.logits[kept], wanted.logits[kept]) < 1e-4
    assert relative(got.loss, wanted.loss) < 1e-4
    by_token = inputs.ids.masked_fill(inputs.ids == IMAGE_TOKEN_ID, TOKEN)
    assert torch.equal(ours(by_token, inputs.mask, inputs.pictures).logits, got.logits)
    wanted.loss.backward()
    got.loss.backward()
    gradients, usual = ours.hf_gradients(), SYSTEMS["llava"].usual_name
    theirs = {usual(name): parameter.grad for name, parameter in reference.named_parameters()}
    compared = [name for name in gradients if name in theirs]
    assert len(compared) > 20
    for part in ("multi_modal_projector.linear_1.weight", "embed_tokens", "self_attn.q_proj.weight"):
        assert any(part in name for name in compared)
    assert ("image_newline" in compared) == (kind == "llava_next")
    scale = max(float(gradient.abs().max()) for gradient in theirs.values() if gradient is not None)
    for name in compared:
        error = (gradients[name] - theirs[name]).abs().max()
        assert error < 1e-3 * max(float(theirs[name].abs().max()), 1e-3 * scale), name
    first, end = inputs.ids[:1], int(inputs.mask[0].sum())
    plain = {name: value[:1] for name, value in inputs.theirs.items()}
    plain |= {name: inputs.theirs[name][:2] for name in ("pixel_values", "image_sizes") if name in inputs.theirs}
    length = int(plain["attention_mask"].sum())
    plain |= {name: plain[name][:, :length] for name in ("input_ids", "attention_mask")}
    greedy = reference.generate(**plain, max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=None)
    answer = ours.generate(first[:, :end], images=inputs.pictures[:2], max_new_tokens=10)
    assert answer[0, end:].tolist() == greedy[0, length:].tolist()


def published(name: str) -> str:
    """As transformers' published checkpoints name their tensors."""
    return SYSTEMS["llava"].usual_name(name)


def newer(name: str) -> str:
    """As newer versions of transformers name them in the model."""
    name = published(name)
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    if name.startswith("language_model.model."):
        return "model.language_model." + name.removeprefix("language_model.model.")
    return "model." + name.replace("vision_tower.vision_model.", "vision_tower.")


def as_saved(name: str) -> str:
    """As the installed version writes them."""
    return name


@pytest.mark.parametrize("layout", [as_saved, published, newer])
@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_files_come_out_as_they_went_in(kind: str, layout: Callable[[str], str], tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    reference = build_reference(kind, "qwen3", "clip", "default")
    reference.save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    tensors = {layout(name): tensor for name, tensor in tensors.items()}
    save_file(tensors, source / "model.safetensors")
    ours = load(source)
    inputs = make_inputs(ours)
    got = ours(inputs.ids, inputs.mask, inputs.pictures)
    kept = inputs.theirs["attention_mask"].bool()
    assert relative(got.logits[kept], reference(**inputs.theirs).logits[kept]) < 1e-4
    export_released(ours.model, target, source=ours.source)
    written = load_file(target / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, target))
    assert {**after, "torch_dtype": "float32"} == {**before, "torch_dtype": "float32"}


@pytest.mark.parametrize(("kind", "decoder", "tower", "strategy"), CASES)
def test_transformers_reads_what_a_training_run_exports(
    kind: str, decoder: str, tower: str, strategy: str, tmp_path: Path
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    reference = build_reference(kind, decoder, tower, strategy)
    reference.save_pretrained(source)
    ours = load(source)
    export_released(ours.model, target)
    assert config_from_hf(read_json(target / "config.json"), target) == ours.config
    again = type(reference).from_pretrained(target).eval()
    for name, parameter in reference.named_parameters():
        assert torch.equal(dict(again.named_parameters())[name], parameter), name
    inputs = make_inputs(ours)
    assert torch.equal(again(**inputs.theirs).logits, reference(**inputs.theirs).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector_hidden_act": "silu"}, "projector_hidden_act must be 'gelu'"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias must be True"),
        ({"vision_feature_layer": [-2, -1]}, "vision_feature_layer must be"),
        ({"vision_feature_select_strategy": "all"}, "must be 'default' or 'full'"),
        ({"vision_feature_select_strategy": "full"}, "select_feature must be patch with model.llava.grids"),
        ({"image_grid_pinpoints": [[28, 30]]}, "pairs of multiples of the tower's image_size 28"),
        ({"image_grid_pinpoints": [[28]]}, "pairs of a height and a width"),
        ({"text_config": {"model_type": "mistral"}}, "text_config.model_type must be one of"),
    ],
)
def test_what_is_not_done_here_is_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    reference = build_reference("llava_next", "qwen3", "clip", "default")
    hf = {**json.loads(reference.config.to_json_string()), **changes}
    with pytest.raises(ConfigError, match=message):
        config_from_hf(hf, tmp_path)


PUBLISHED: dict[str, Any] = {  # fields of llava-hf/llava-1.5-7b-hf
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_a_published_file_leaves_out_what_transformers_knows(kind: str, tmp_path: Path) -> None:
    hf = {**PUBLISHED, "model_type": kind}
    config = config_from_hf(hf, tmp_path)
    llm = config.llm
    assert (llm.family, llm.hidden_size, llm.num_layers, llm.num_query_groups) == ("llama", 4096, 32, 32)
    assert (llm.ffn_hidden_size, llm.vocab_size, llm.norm_eps, llm.rope_base) == (11008, 32064, 1e-5, 10_000.0)
    assert (config.max_seq_len, config.llava.image_token_id, config.rows_per_image) == (4096, 32000, 576)
    grids = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    assert config.llava.grids == (grids if kind == "llava_next" else ())
    assert config_to_hf(config, hf, tmp_path) == hf


def test_a_tower_that_transformers_does_not_have_is_written_out_in_our_own_part(tmp_path: Path) -> None:
    config = config_from_dict(ParrotConfig, read_yaml(list_presets()["llava_tiny_cpu"])["model"])
    hf = config_to_hf(config, None, tmp_path)
    assert "vision_config" not in hf
    assert config_from_hf(hf, tmp_path) == config
    assert config_to_hf(config, hf, tmp_path) == hf


def test_a_missing_newline_row_is_named(tmp_path: Path) -> None:
    build_reference("llava_next", "qwen3", "clip", "default").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["image_newline"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing:\n  image_newline \[32\]"):
        load(tmp_path)


def test_a_model_without_files_can_be_built_and_changed(tmp_path: Path) -> None:
    build_reference("llava_next", "qwen3", "clip", "default").save_pretrained(tmp_path)
    config = config_of(load(tmp_path).model)
    plain = replace(config, llava=replace(config.llava, grids=()))
    assert SYSTEMS["llava"].model_type(plain) == "llava"
    with pytest.raises(ConfigError, match=r"projector\.type must be mlp2x_gelu"):
        replace(config, projector=replace(config.projector, type="linear"))
    with pytest.raises(ConfigError, match=r"image_token_id must be in 0 \.\. 95"):
        replace(config, llava=replace(config.llava, image_token_id=96))
