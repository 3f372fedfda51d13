"""Key map of the vision towers: `parrot_sys.megatron.vision` <-> Hugging Face's vision models."""

from __future__ import annotations

import torch

from parrot_sys.models.efficientnet import EfficientNetLite0
from parrot_sys.models.tensor_map import TensorMap, copied, norm_maps, qkv_map, reshaped
from parrot_sys.towers import TensorNames, VisionConfig

VISION_MODEL = "vision_model."
"""Before the names of a tower inside a larger checkpoint, and of some that stand alone."""


def unused_name(key: str) -> str:
    """Name of the buffer that keeps a tower tensor which is not run (a buffer's name may not hold dots)."""
    return f"unused.{key.replace('.', '__')}"


def tower_maps(config: VisionConfig, prefix: str = "", key_prefix: str = VISION_MODEL) -> list[TensorMap]:
    """Tower (`parrot_sys.megatron.vision`, its names after `prefix`) <-> Hugging Face vision model."""
    transformer = config.tower.transformer
    if transformer is None:
        return _network_maps(prefix, key_prefix)
    names, size = transformer.names, config.hidden_size
    maps = _embeddings(config, names, transformer.patch_bias, prefix, key_prefix)
    if names.pre_norm is not None:
        maps += norm_maps(f"{prefix}pre_layernorm", f"{key_prefix}{names.pre_norm}", size)
    run = config.num_layers_run
    for layer in range(run):
        key = key_prefix + names.layer.format(layer)
        maps += _block(config, names, f"{prefix}encoder.layers.{layer}", key)
    skipped = norm_maps("", key_prefix + names.final_norm, size)
    for layer in range(run, config.num_layers):
        skipped += _block(config, names, "", key_prefix + names.layer.format(layer))
    for entry in skipped:
        for key, shape in zip(entry.keys, entry.shapes, strict=True):
            maps.append(copied(prefix + unused_name(key.removeprefix(key_prefix)), key, *shape))
    return maps


def is_passed_over(key: str, config: VisionConfig) -> bool:
    """Whether a tower's checkpoint may hold a tensor (its name after `vision_model.`) that no tower here has."""
    transformer = config.tower.transformer
    return transformer is not None and key.startswith(transformer.names.passed_over)


def _network_maps(prefix: str, key_prefix: str) -> list[TensorMap]:
    with torch.device("meta"):
        state = EfficientNetLite0().state_dict()
    return [copied(prefix + name, key_prefix + name, *tensor.shape) for name, tensor in state.items()]


def _embeddings(
    config: VisionConfig, names: TensorNames, patch_bias: bool, prefix: str, key_prefix: str
) -> list[TensorMap]:
    size, patch = config.hidden_size, config.patch_size
    axes = 1 if names.batched else 0
    maps = [
        copied(f"{prefix}patch_embedding.weight", f"{key_prefix}{names.patch}.weight", size, 3, patch, patch),
        reshaped(f"{prefix}position_embedding", key_prefix + names.position, config.num_tower_rows, size, axes=axes),
    ]
    if patch_bias:
        maps.append(copied(f"{prefix}patch_embedding.bias", f"{key_prefix}{names.patch}.bias", size))
    if names.cls is not None:
        maps.append(reshaped(f"{prefix}class_embedding", key_prefix + names.cls, size, axes=2 * axes))
    return maps


def _block(config: VisionConfig, names: TensorNames, ours: str, key: str) -> list[TensorMap]:
    size, ffn, heads = config.hidden_size, config.ffn_hidden_size, config.num_attention_heads
    projections = tuple(f"{key}.{name}" for name in (names.query, names.key, names.value))
    qkv = f"{ours}.self_attention.linear_qkv"
    maps = [
        *norm_maps(f"{ours}.input_layernorm", f"{key}.{names.norm1}", size),
        *norm_maps(f"{ours}.pre_mlp_layernorm", f"{key}.{names.norm2}", size),
        qkv_map(qkv, projections, "weight", (size,) * 3, heads, size),
        qkv_map(qkv, projections, "bias", (size,) * 3, heads),
    ]
    for name, part, rows, columns in (
        ("self_attention.linear_proj", names.out, size, size),
        ("mlp.linear_fc1", names.fc1, ffn, size),
        ("mlp.linear_fc2", names.fc2, size, ffn),
    ):
        maps.append(copied(f"{ours}.{name}.weight", f"{key}.{part}.weight", rows, columns))
        maps.append(copied(f"{ours}.{name}.bias", f"{key}.{part}.bias", rows))
    for name, scale in zip(("self_attn_bda", "mlp_bda"), names.scales or (), strict=False):
        maps.append(copied(f"{ours}.{name}.scale", f"{key}.{scale}", size))
    return maps
