"""The parameters that a rank holds, tensor by tensor, as `parrot_sys.megatron` and `modules` make them."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch

from parrot_sys.models.efficientnet import EfficientNetLite0
from parrot_sys.models.tower_maps import tower_maps
from parrot_sys.systems.cost import Weight
from parrot_sys.systems.decoder_costs import layer_weights
from parrot_sys.systems.layout import Layout
from parrot_sys.systems.system_costs import Job
from parrot_sys.towers import VisionConfig


def stage_weights(job: Job, layout: Layout, stage: int) -> list[Weight]:
    """Parameters of a rank of a pipeline stage: all before the decoder on the first, LM head on the last."""
    first, last = stage == 0, stage == layout.pipeline - 1
    model, costs = job.model, job.costs
    llm, tensor = model.llm, layout.tensor
    size, vocabulary = llm.hidden_size, llm.vocab_size // tensor
    weights: list[Weight] = []
    if first:
        weights += [*_vision(model.vision, tensor), *costs.weights(model, layout)]
        weights.append(Weight("llm", vocabulary * size))
    for layer, count in Counter(itertools.chain(*layout.layers(job.kinds, stage))).items():
        own = layer_weights(llm, model.lora, layout, layer)
        for weight in itertools.chain(own, costs.layer_weights(model, layout, layer)):
            weights.append(replace(weight, count=count * weight.count))
    if last:
        weights.append(Weight("llm", size, replicated=True))
        # A tied head is the embedding itself, of which the last of several stages holds a copy.
        if not llm.tie_word_embeddings or not first:
            weights.append(Weight("llm", vocabulary * size))
    return weights


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
    return [weight for weight in weights if job.trainable[weight.component]]
