"""Bytes of one GPU: parameters, gradients, optimizer state, activations, buffers.

Activations follow Korthikanti et al. (arXiv 2205.05198, section 4) in method: add up what each operation keeps for its
backward pass. The terms are those of this implementation: no dropout masks, no attention matrix, SwiGLU as three
operations, experts that keep their input X and the up-projection z only, an LM head that keeps its label rows only.

T rows of a micro-batch (T' on this rank under context parallelism), t tensor-parallel ranks, H hidden_size, n query and
g key/value heads of width d, F ffn_hidden_size, L label rows, V visual rows of an image, b bytes of an element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from parrot_sys.planning.dispatch import Dispatch
from parrot_sys.planning.job import Job, MicroBatch
from parrot_sys.planning.layouts import Layout
from parrot_sys.planning.schedule import peak_in_flight
from parrot_sys.planning.weights import (
    Weight,
    buffer_elements,
    cut_projector_layers,
    stage_weights,
    trainable_weights,
)


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
    weights = stage_weights(job.model, layout, stage)
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
    inputs, kept = layer_input_bytes(job, layout, batch), layer_bytes(job, layout, batch)
    if not job.gradient_reaches("llm"):
        inputs = kept = 0.0
    chunks = [
        count * (inputs if layout.recompute else kept) for count in layout.chunk_layers(job.model.llm.num_layers, stage)
    ]
    if stage == 0:
        chunks[0] += first_stage_bytes(job, layout, batch)
    total = peak_in_flight(chunks, layout.pipeline, stage, num_micro_batches)
    # Once layers are computed again, what the LM head kept is gone.
    head = head_bytes(job, layout, batch) if stage == layout.pipeline - 1 else 0.0
    return total + max(head, kept - inputs if layout.recompute else 0.0)


def _rows(layout: Layout, batch: MicroBatch) -> tuple[float, float]:
    """Rows of this rank in the matrices, and in norms and residuals."""
    rows = layout.local_rows(batch.rows)
    return rows, rows / layout.tensor if layout.sequence else rows


def _norm_bytes(job: Job, learns: bool) -> float:
    """An RMSNorm for each row: input and 1 / rms; without a fused kernel all in float32, and the normalised row."""
    size = job.model.llm.hidden_size
    if job.kernels == "cpu":
        return 4 * size * (2 if learns else 1) + 4
    return job.bytes * size + 4


def layer_input_bytes(job: Job, layout: Layout, batch: MicroBatch) -> float:
    """The input of a decoder layer: b T' H, cut by sequence parallelism."""
    return job.bytes * _rows(layout, batch)[1] * job.model.llm.hidden_size


def layer_bytes(job: Job, layout: Layout, batch: MicroBatch) -> float:
    """Bytes that a decoder layer keeps.

    Per row: two norms; inputs of the four matrices that learn (b H twice, b F / t; that of the output projection is
    the attention's output); queries, keys, values, output and log-sum-exp of flash attention; SwiGLU b 4 F / t: gate
    and up together, silu(gate), and up once more, to which Megatron adds an offset.
    """
    llm, b, tensor = job.model.llm, job.bytes, layout.tensor
    learns = job.trainable["llm"]
    rows, narrow = _rows(layout, batch)
    norms = 2 * (_norm_bytes(job, learns) + (b * llm.hidden_size if learns else 0))
    swiglu = b * llm.ffn_hidden_size / tensor * (5 if learns else 4)
    return narrow * norms + rows * (_attention_bytes(job, layout) + swiglu)


def _attention_bytes(job: Job, layout: Layout) -> float:
    """Per row: rotated queries and keys, values, output [n d] and log-sum-exp.

    Values are a view of the whole joint projection (n + 2 g) d, unless they are copied: to as many heads as the
    queries have (flash kernel on GPUs), or for the other context-parallel ranks.
    """
    llm = job.model.llm
    query = llm.num_attention_heads * llm.kv_channels
    key = llm.num_query_groups * llm.kv_channels
    if layout.context > 1:
        elements = query + 2 * key + query
    elif key < query and job.kernels == "gpu":
        elements = query + 2 * query + query
    else:
        elements = (query + 2 * key) + query + key + query
    return (job.bytes * elements + 4 * llm.num_attention_heads) / layout.tensor


def first_stage_bytes(job: Job, layout: Layout, batch: MicroBatch) -> float:
    """Tower, projector, experts and embeddings.

    Context-parallel ranks share the images out, and each puts all of them in place; tensor-parallel ones cut tower and
    projector.
    """
    model, b = job.model, job.bytes
    size, images = model.llm.hidden_size, layout.local_images(batch.images)
    visual = images * model.vision.num_visual_rows
    learns = job.trainable
    total = 8 * batch.rows if learns["llm"] else 0.0  # ids of the embedding
    if layout.sequence and job.gradient_reaches("llm") and (job.kernels == "gpu" or b == 4 or layout.recompute):
        # The first layer's input is a view of the rows of all ranks.
        total += b * layout.local_rows(batch.rows) * size * (1 - 1 / layout.tensor)
    if learns["vision"]:
        total += _tower_bytes(job, layout, images)
    if learns["projector"]:
        total += b * visual * model.vision.hidden_size
    if job.gradient_reaches("projector"):
        # After each layer but the last: what the activation takes, and what it gives to a layer that learns.
        cut = cut_projector_layers(model) // 2
        widths = size * (cut / layout.tensor + model.projector.depth - 1 - cut)
        total += b * visual * widths * (2 if learns["projector"] else 1)
    if job.moe_active and (job.gradient_reaches("moe")):
        total += expert_bytes(job, layout, batch)
        total += b * batch.guidance_rows * size + (8 * batch.guidance_rows if learns["llm"] else 0)
    if job.gradient_reaches("moe"):
        # Putting visual rows in place keeps them, and two indices.
        total += batch.images * model.vision.num_visual_rows * (b * size + 16)
    return total


def expert_bytes(job: Job, layout: Layout, batch: MicroBatch) -> float:
    """X [n, V, H] and z [experts of an image, n, V, 2, I] (ops/expert_mlp.py); with `moe.recompute` X only.

    Where images travel, those that arrived are X, and the router keeps the rank's own; images sent to chosen ranks are
    kept once more when they are back, each copy of them (ops/permute.py).
    """
    moe, b = job.model.moe, job.bytes
    sent = Dispatch.of(job, layout, layout.local_images(batch.images))
    held = sent.arriving
    if sent.way in ("gathered", "exchanged"):
        held += sent.images
    if sent.way == "exchanged":
        held += sent.sent
    z = 0.0 if moe.recompute else 2 * job.chosen_experts * moe.ffn_hidden_size
    return b * job.model.vision.num_visual_rows * (held * job.model.llm.hidden_size + sent.worth * z)


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
    if not job.gradient_reaches("llm"):
        return 0.0
    size, learns = job.model.llm.hidden_size, job.trainable["llm"]
    norm = _norm_bytes(job, learns) * _rows(layout, batch)[1]
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
    experts = 0.0
    if job.moe_active:
        sent = Dispatch.of(job, layout, layout.local_images(batch.images))
        inner = 3 * sent.worth * job.chosen_experts * job.model.moe.ffn_hidden_size
        travelling = 2 * sent.arriving * llm.hidden_size if sent.way in ("gathered", "exchanged") else 0.0
        experts = job.model.vision.num_visual_rows * (inner + travelling)
    passing = b * (max((weight.numel for weight in learning), default=0) + max(rows * widest, experts))
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
