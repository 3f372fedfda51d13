"""The parameters that a rank holds, tensor by tensor, as `parrot_sys.megatron` and `modules` make them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from parrot_sys.models.efficientnet import EfficientNetLite0
from parrot_sys.models.tower_maps import tower_maps
from parrot_sys.planning.job import Job
from parrot_sys.planning.layouts import Layout
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.towers import VisionConfig


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter, `count` times."""

    component: str  # vision, projector, moe, llm
    numel: int  # on this rank
    count: int = 1
    routed: bool = False  # an expert's, whose copies are on other ranks than those of dense parameters
    replicated: bool = False  # whole on every tensor-parallel rank, used on a part of the rows under SP

    @property
    def total(self) -> int:
        """Elements of all of them."""
        return self.numel * self.count


def stage_weights(model: ParrotConfig, layout: Layout, stage: int) -> list[Weight]:
    """Parameters of a rank of a pipeline stage: vision, projector and experts on the first, LM head on the last."""
    first, last = stage == 0, stage == layout.pipeline - 1
    llm, tensor = model.llm, layout.tensor
    size, vocabulary = llm.hidden_size, llm.vocab_size // tensor
    weights: list[Weight] = []
    if first:
        weights += [*_vision(model.vision, tensor), *_projector(model, tensor), *_experts(model, layout)]
        weights.append(Weight("llm", vocabulary * size))
    weights += _decoder_layers(model, layout, stage)
    if last:
        weights.append(Weight("llm", size, replicated=True))
        # A tied head is the embedding itself, of which the last of several stages holds a copy.
        if not llm.tie_word_embeddings or not first:
            weights.append(Weight("llm", vocabulary * size))
    return weights


def _decoder_layers(model: ParrotConfig, layout: Layout, stage: int) -> Iterator[Weight]:
    llm, tensor = model.llm, layout.tensor
    size, heads, groups, width = llm.hidden_size, llm.num_attention_heads, llm.num_query_groups, llm.kv_channels
    count, ffn = layout.layers(llm.num_layers, stage), llm.ffn_hidden_size // tensor
    qkv = (heads + 2 * groups) * width // tensor
    yield Weight("llm", size, 2 * count, replicated=True)  # norms
    yield Weight("llm", qkv * size, count)
    if llm.qk_norm:
        yield Weight("llm", width, 2 * count, replicated=True)
    if llm.qkv_bias:
        yield Weight("llm", qkv, count)
    yield Weight("llm", heads * width // tensor * size, count)
    yield Weight("llm", 2 * ffn * size, count)
    yield Weight("llm", ffn * size, count)


def cut_projector_layers(model: ParrotConfig) -> int:
    """The projector's layers that tensor-parallel ranks share: pairs, from the first on."""
    return model.projector.depth // 2 * 2


def _projector(model: ParrotConfig, tensor: int) -> Iterator[Weight]:
    size = model.llm.hidden_size
    for layer in range(model.projector.depth):
        parts = tensor if layer < cut_projector_layers(model) else 1
        yield Weight("projector", (model.vision.hidden_size if layer == 0 else size) * size // parts)
        # Second layers of a pair are cut by their inputs.
        yield Weight("projector", size // parts if layer % 2 == 0 else size)


def _experts(model: ParrotConfig, layout: Layout) -> Iterator[Weight]:
    moe, size = model.moe, model.llm.hidden_size
    if moe.num_experts:
        inner = moe.num_experts // layout.expert * moe.ffn_hidden_size // layout.expert_tensor
        apart = layout.expert * layout.expert_tensor != layout.tensor
        yield Weight("moe", moe.num_experts * size)
        yield Weight("moe", 2 * inner * size, routed=apart)
        yield Weight("moe", inner * size, routed=apart)


def _vision(vision: VisionConfig, tensor: int) -> Iterator[Weight]:
    tower = vision.tower
    if (transformer := tower.transformer) is None:
        yield Weight("vision", _network()[0])
        return
    size, count = vision.hidden_size, vision.num_layers_run
    yield Weight("vision", size * 3 * vision.patch_size**2)
    yield Weight("vision", vision.num_tower_rows * size)
    yield Weight("vision", size, tower.has_cls + 2 * tower.has_pre_norm + transformer.patch_bias)
    ffn = vision.ffn_hidden_size
    # Two norms; biases that are not cut; scales.
    yield Weight("vision", size, (4 + 2 + 2 * tower.has_layer_scale) * count)
    yield Weight("vision", 3 * size // tensor * size, count)
    yield Weight("vision", 3 * size // tensor, count)
    yield Weight("vision", size // tensor * size, count)
    yield Weight("vision", ffn // tensor * size, 2 * count)
    yield Weight("vision", ffn // tensor, count)


@functools.cache
def _network() -> tuple[int, int]:
    """Elements of the parameters and of the buffers."""
    with torch.device("meta"):
        tower = EfficientNetLite0()
    return sum(p.numel() for p in tower.parameters()), sum(b.numel() for b in tower.buffers())


@functools.cache
def buffer_elements(vision: VisionConfig) -> int:
    """Elements of the tower's tensors that are no parameters, or kept but never run (`VisionTransformer.unused`)."""
    if vision.tower.transformer is None:
        return _network()[1]
    unused = (entry for entry in tower_maps(vision) if entry.name.startswith("unused."))
    return sum(math.prod(entry.shapes[0]) for entry in unused)


def trainable_weights(job: Job, weights: list[Weight]) -> list[Weight]:
    """The weights with gradients and optimizer state."""
    learns = job.trainable
    return [weight for weight in weights if learns[weight.component]]
