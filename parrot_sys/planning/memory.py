"""Bytes of one GPU: parameters, gradients, optimizer state, activations, buffers.

Activations are added up from what each operation keeps for its backward pass: those of a decoder layer in
`systems/decoder_costs.py`, those of a system's own parts in its `costs.py`.

T rows of a micro-batch (T' on this rank under context parallelism), t tensor-parallel ranks, H hidden_size, V visual
rows of an image, b bytes of an element.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from parrot_sys.planning.schedule import peak_in_flight
from parrot_sys.planning.weights import buffer_elements, stage_weights, trainable_weights
from parrot_sys.systems.cost import Weight
from parrot_sys.systems.decoder_costs import layer_bytes, norm_bytes
from parrot_sys.systems.layout import Layout
from parrot_sys.systems.system_costs import Job, MicroBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes of one GPU at its peak."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float

    @property
    def total(self) -> float:
        """Sum of all."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.buffers

    def as_dict(self) -> dict[str, float]:
        """Part -> bytes."""
        names = ("parameters", "gradients", "optimizer", "activations", "buffers")
        return {name: getattr(self, name) for name in names}


def stage_memory(job: Job, layout: Layout, stage: int, batch: MicroBatch, num_micro_batches: int) -> Memory:
    """Memory of a rank of pipeline stage `stage`, whose largest micro-batches are like `batch`."""
    weights = stage_weights(job, layout, stage)
    learning = trainable_weights(job, weights)
    parameters, gradients, optimizer = state_bytes(job, layout, weights, stage)
    activations = activation_bytes(job, layout, stage, batch, num_micro_batches)
    return Memory(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        buffers=_working_bytes(job, layout, learning, batch, activations),
    )


def state_bytes(job: Job, layout: Layout, weights: list[Weight], stage: int) -> tuple[float, float, float]:
    """Parameters (with the tower's unused tensors), gradients and optimizer state.

    Gradients are one float32 buffer. Adam keeps two float32 moments, and float32 main parameters beside bf16 ones
    (mixed precision, arXiv 1710.03740). The distributed optimizer (ZeRO-1, arXiv 1910.02054) deals this state over the
    data- and context-parallel ranks; its buffers start each parameter at a multiple of 64 elements.
    """
    frozen_buffers = buffer_elements(job.model.vision) if stage == 0 else 0
    parameters = job.bytes * (sum(weight.total for weight in weights) + frozen_buffers)
    gradients = optimizer = 0.0
    for routed in (False, True):
        learning = [weight for weight in trainable_weights(job, weights) if weight.routed == routed]
        copies = layout.expert_copies if routed else layout.model_copies
        elements = sum(weight.total for weight in learning)
        padded = padded_elements(learning, copies) if layout.distributed_optimizer else elements
        gradients += 4 * padded
        shard = elements / copies if layout.distributed_optimizer else elements
        optimizer += shard * (12 if job.precision == "bf16" else 8)
        if layout.distributed_optimizer:
            parameters += job.bytes * (padded - elements)
    return parameters, gradients, optimizer


def padded_elements(weights: list[Weight], copies: int) -> int:
    """Elements of Megatron's buffer: parameters at multiples of 64, the end at one of lcm(copies, 128)."""
    if not weights:
        return 0
    total = sum(math.ceil(weight.numel / 64) * 64 * weight.count for weight in weights)
    unit = math.lcm(copies, 128)
    return math.ceil(total / unit) * unit


def activation_bytes(job: Job, layout: Layout, stage: int, batch: MicroBatch, num_micro_batches: int = 1) -> float:
    """Bytes that a stage keeps between forward and backward passes, largest at any time.

    Full recomputation keeps the input of each layer, and once all of a layer that is being computed again.
    """
    chunks, again = [], 0.0
    for number, layers in enumerate(layout.layers(job.kinds, stage)):
        kept, computed = _chunk_bytes(job, layout, batch, layers, first=stage == 0 and number == 0)
        chunks.append(kept)
        again = max(again, computed)
    if stage == 0:
        chunks[0] += first_stage_bytes(job, layout, batch)
    total = peak_in_flight(chunks, layout.pipeline, stage, num_micro_batches)
    # Once layers are computed again, what the LM head kept is gone.
    head = head_bytes(job, layout, batch) if stage == layout.pipeline - 1 else 0.0
    return total + max(head, again)


def _chunk_bytes(
    job: Job, layout: Layout, batch: MicroBatch, layers: tuple[int, ...], *, first: bool
) -> tuple[float, float]:
    """Bytes that a chunk of layers keeps, and what a layer that is computed again has at most beyond the inputs.

    Args:
        job, layout, batch: of the rank.
        layers: one after the other.
        first: whether they are the first of the model. Those of later stages, and all that are computed again, get
            their input with a gradient whatever learns before them.
    """
    if not job.anything_learns:
        return 0.0, 0.0
    inputs = layer_input_bytes(job, layout, batch)
    kept = {}
    for layer in set(layers):
        reached = job.rows_learn[layer] or not first or layout.recompute
        own = job.costs.layer_learns(job, layer)
        kept[layer] = job.costs.layer_bytes(job, layout, batch, layer) if reached or own else 0.0
        if reached or job.learns("lora") or own:
            attention = reached or job.learns("lora") or job.costs.learns_before_attention(job, layer)
            kept[layer] += layer_bytes(job, layout, batch, layer, attention_learns=attention)
    shared = job.costs.chunk_bytes(job, layout, batch, kept)
    if not layout.recompute:
        return shared + sum(count * kept[layer] for layer, count in Counter(layers).items()), 0.0
    # The last layers are computed again first, and then gone.
    extra = max((kept[layer] - inputs * (len(layers) - place) for place, layer in enumerate(layers)), default=0.0)
    return shared + inputs * len(layers), extra


def layer_input_bytes(job: Job, layout: Layout, batch: MicroBatch) -> float:
    """The input of a decoder layer: b T' H, cut by sequence parallelism."""
    return job.bytes * layout.rows_and_narrow(batch.rows)[1] * job.model.llm.hidden_size


def first_stage_bytes(job: Job, layout: Layout, batch: MicroBatch) -> float:
    """Tower, the system's parts before the decoder, and embeddings."""
    model, b = job.model, job.bytes
    total = 8 * batch.rows if job.learns("llm") else 0.0  # ids of the embedding
    if layout.sequence and job.rows_learn[0] and (job.kernels == "gpu" or b == 4 or layout.recompute):
        # The first layer's input is a view of the rows of all ranks.
        total += b * layout.local_rows(batch.rows) * model.llm.hidden_size * (1 - 1 / layout.tensor)
    if job.learns("vision"):
        total += _tower_bytes(job, layout, layout.local_images(batch.images))
    return total + job.costs.first_bytes(job, layout, batch)


def _tower_bytes(job: Job, layout: Layout, images: float) -> float:
    """A trainable ViT: pixels, and per block two layer norms, biased matrices, attention and its activation."""
    vision, b, tensor = job.model.vision, job.bytes, layout.tensor
    rows = images * vision.num_tower_rows
    size, ffn = vision.hidden_size, vision.ffn_hidden_size / tensor
    norm = b * size + 8
    # Joint projection, output, and the output again: transposed for the matrix after it.
    attention = (b * (3 * size + 2 * size) + 4 * vision.num_attention_heads) / tensor
    activation = ffn * b * ((2 if vision.activation == "quick_gelu" else 1) + 1)
    block = 2 * (norm + b * size) + attention + activation + 2 * b * size * vision.tower.has_layer_scale
    pixels = images * 3 * vision.image_size**2 * b
    return pixels + rows * (vision.num_layers_run * block + (norm if vision.tower.has_pre_norm else 0))


def head_bytes(job: Job, layout: Layout, batch: MicroBatch) -> float:
    """The final norm, and the label rows of the LM head with their targets; no logits."""
    if not job.anything_learns:
        return 0.0
    size = job.model.llm.hidden_size
    norm = norm_bytes(job, size, learns=job.learns("llm")) * layout.rows_and_narrow(batch.rows)[1]
    scalars = 8 + 8 + 4 + (16 if layout.tensor > 1 else 1)
    return norm + batch.label_rows / layout.context * (job.bytes * size + scalars)


def _working_bytes(job: Job, layout: Layout, learning: list[Weight], batch: MicroBatch, activations: float) -> float:
    """Bytes that exist only for a moment, at their largest.

    In the backward pass: the gradient of the largest matrix before it is added to the buffer, gradients of the widest
    rows (or of the experts and of the images that are with them), and what sequence and context parallelism gather. In
    the update (activations are gone then): one float32 number for each element of the optimizer's share (our Adam
    without a fused kernel).
    """
    rows = layout.local_rows(batch.rows)
    llm, b = job.model.llm, job.bytes
    widest = max(3 * llm.ffn_hidden_size / layout.tensor, 4 * llm.hidden_size)
    if (chosen := llm.experts) is not None:
        # Rows that arrive at this rank's experts, as a share of its own.
        arriving = chosen.topk * layout.expert_tensor / (layout.tensor if layout.sequence else 1)
        widest = max(widest, arriving * (3 * chosen.ffn_hidden_size / layout.expert_tensor + llm.hidden_size))
    before = job.costs.working_bytes(job, layout, batch) / b
    passing = b * (max((weight.numel for weight in learning), default=0) + max(rows * widest, before))
    if layout.sequence:
        passing += b * rows * llm.hidden_size
    if layout.context > 1:
        # Keys and values of all ranks, and their copies in the order of the pack (docs/parallelism.md).
        passing += 4 * b * 2 * llm.num_query_groups * llm.kv_channels * rows * layout.context / layout.tensor
    share = sum(
        weight.total
        / ((layout.expert_copies if weight.routed else layout.model_copies) if layout.distributed_optimizer else 1)
        for weight in learning
    )
    return max(passing, 4 * share - activations)
