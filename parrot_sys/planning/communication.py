"""Messages of a training step: bytes of each parallel dimension, and their time.

Payloads are those of the code: the whole tensor of an all-reduce or all-to-all, the gathered one of an all-gather, the
one that is cut of a reduce-scatter. Of a payload S a rank of n sends 2 (n - 1) / n S in an all-reduce and (n - 1) / n S
in the others (ring algorithms; Thakur et al., 2005), and S to the next pipeline stage. Tensor and sequence parallelism
as in Megatron-LM (arXiv 1909.08053, 2205.05198). Counts of labels and metrics (hundreds of bytes) are left out.

T' rows of a micro-batch on this rank, H hidden_size, L label rows, n images of V rows, b bytes of an element.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from parrot_sys.planning.cluster import ClusterConfig
from parrot_sys.planning.memory import padded_elements
from parrot_sys.planning.weights import stage_weights, trainable_weights
from parrot_sys.systems.cost import Message, Weight, message
from parrot_sys.systems.decoder_costs import layer_messages
from parrot_sys.systems.layout import Layout
from parrot_sys.systems.system_costs import Job, MicroBatch

_BUCKET_ELEMENTS, _BUCKET_ELEMENTS_A_RANK = 40_000_000, 1_000_000
"""Gradients that Megatron's overlapped reduction sends together."""

_SHAPE_BYTES = 24
"""Sent before each hidden state: packed micro-batches differ in their rows."""


def seconds_of(message: Message, layout: Layout, cluster: ClusterConfig) -> float:
    """Time of a message on the links of its group."""
    size = 2 if message.operation == "send" else message.size
    return cluster.collective_seconds(message.sent, size, layout.stride(message.dimension), message.calls)


def micro_batch_messages(job: Job, layout: Layout, stage: int, batch: MicroBatch) -> list[Message]:
    """Messages of one micro-batch on a rank of pipeline stage `stage`."""
    messages: list[Message] = []
    if stage == 0:
        messages += job.costs.first_messages(job, layout, batch)
        if layout.tensor > 1:
            messages += _embedding_messages(job, layout, batch)
    for number, layers in enumerate(layout.layers(job.kinds, stage)):
        first = stage == 0 and number == 0
        messages += _memory_messages(job, layout, batch, first=first)
        for layer, count in Counter(layers).items():
            rows_learn = job.rows_learn[layer] or not first or layout.recompute
            messages += _repeated(_layer_messages(job, layout, batch, layer, rows_learn), count)
    if stage == layout.pipeline - 1 and layout.tensor > 1:
        messages += _head_messages(job, layout, batch)
    if layout.pipeline > 1:
        messages += _pipeline_messages(job, layout, stage, batch)
    return messages


def _layer_messages(job: Job, layout: Layout, batch: MicroBatch, layer: int, rows_learn: bool) -> Iterator[Message]:
    """Messages of a layer and of what the system has inside it."""
    yield from job.costs.layer_messages(job, layout, batch, layer, rows_learn=rows_learn)
    rows_learn = rows_learn or job.costs.learns_before_attention(job, layer)
    yield from layer_messages(job, layout, batch, layer, rows_learn=rows_learn)


def _repeated(messages: Iterable[Message], count: int) -> Iterator[Message]:
    return (replace(each, payload=each.payload * count, calls=each.calls * count) for each in messages)


def _memory_rows(job: Job, layout: Layout, batch: MicroBatch) -> float:
    """Rows of the hidden states' width that carry the memory to the next stage, over all tensor-parallel ranks."""
    rows, width = job.costs.memory(job, batch)
    parts = layout.tensor if layout.sequence else 1
    return math.ceil(rows * width / (job.model.llm.hidden_size * parts)) * parts


def _memory_messages(job: Job, layout: Layout, batch: MicroBatch, *, first: bool) -> Iterator[Message]:
    """Rows that the layers read besides their own: whole on each rank, gradients summed once a chunk of layers."""
    size, learns = layout.tensor, job.costs.memory_learns(job) or not first
    payload = job.bytes * _memory_rows(job, layout, batch) * job.model.llm.hidden_size
    if size == 1 or not payload:
        return
    if layout.sequence:
        yield message("tensor", "all_gather", payload, 1, size)
        if learns:
            yield message("tensor", "reduce_scatter", payload, 1, size, backward=True)
            if first:  # cut in the first place
                yield message("tensor", "all_gather", payload, 1, size, backward=True)
    elif learns:
        yield message("tensor", "all_reduce", payload, 1, size, backward=True)


def _embedding_messages(job: Job, layout: Layout, batch: MicroBatch) -> Iterator[Message]:
    """Rows of a cut vocabulary are added up; the tower, cut by heads, sums twice in each block."""
    vision, size = job.model.vision, layout.tensor
    row = job.bytes * job.model.llm.hidden_size
    yield message("tensor", "all_reduce", batch.rows * row, 1, size)
    if layout.sequence and job.rows_learn[0]:
        yield message("tensor", "all_gather", layout.local_rows(batch.rows) * row, 1, size, backward=True)
    if vision.tower.transformer is not None and batch.images:
        features = job.bytes * layout.local_images(batch.images) * vision.num_tower_rows * vision.hidden_size
        calls = 2 * vision.num_layers_run
        yield message("tensor", "all_reduce", features, calls, size)
        if job.learns("vision"):
            yield message("tensor", "all_reduce", features, calls, size, backward=True)


def _head_messages(job: Job, layout: Layout, batch: MicroBatch) -> Iterator[Message]:
    """All rows reach every rank's part of the vocabulary; three numbers a label make the loss."""
    size = layout.tensor
    rows = job.bytes * layout.local_rows(batch.rows) * job.model.llm.hidden_size
    if layout.sequence:
        yield message("tensor", "all_gather", rows, 1, size)
        yield message("tensor", "reduce_scatter", rows, 1, size, backward=True)
    else:
        yield message("tensor", "all_reduce", rows, 1, size, backward=True)
    yield message("tensor", "all_reduce", 6 * batch.label_rows / layout.context, 2, size)


def _pipeline_messages(job: Job, layout: Layout, stage: int, batch: MicroBatch) -> Iterator[Message]:
    """Hidden states to the next stage, their gradients to the one before; once for each chunk of layers."""
    rows = layout.local_rows(batch.rows) + _memory_rows(job, layout, batch)
    rows *= job.bytes * job.model.llm.hidden_size
    if layout.sequence:
        rows /= layout.tensor
    rows += _SHAPE_BYTES
    # With chunks the last stage hands on to the first.
    sends = layout.virtual - (stage == layout.pipeline - 1)
    receives = layout.virtual - (stage == 0)
    if sends:
        yield message("pipeline", "send", rows, sends, layout.pipeline)
    if receives:
        yield message("pipeline", "send", rows, receives, layout.pipeline, backward=True)


def step_messages(job: Job, layout: Layout, stage: int) -> list[Message]:
    """Messages once a step: gradients, with the distributed optimizer updated parameters, and shared parameters."""
    learning = trainable_weights(job, stage_weights(job, layout, stage))
    messages: list[Message] = []
    for routed in (False, True):
        messages += _gradient_messages(job, layout, [weight for weight in learning if weight.routed == routed], routed)
    if layout.tensor > 1:
        summed = [weight for weight in learning if weight.by_heads or (weight.replicated and layout.sequence)]
        elements = sum(weight.total for weight in summed)
        messages.append(message("tensor", "all_reduce", 4 * elements, 1, layout.tensor, backward=True))
    ends = stage in (0, layout.pipeline - 1)
    if job.model.llm.tie_word_embeddings and layout.pipeline > 1 and ends and job.learns("llm"):
        shared = 4 * job.model.llm.vocab_size // layout.tensor * job.model.llm.hidden_size
        messages.append(message("pipeline", "all_reduce", shared, 1, 2, backward=True))
    return messages


def _gradient_messages(job: Job, layout: Layout, weights: list[Weight], routed: bool) -> Iterator[Message]:
    """Gradients in float32 over the ranks that hold the same parameters; with ZeRO-1 their new values as well."""
    copies = layout.expert_copies if routed else layout.model_copies
    if not weights or copies == 1:
        return
    dimension = "expert_data" if routed else "data"
    elements = sum(weight.total for weight in weights)
    if layout.distributed_optimizer:
        elements = padded_elements(weights, copies)
    buckets = math.ceil(elements / max(_BUCKET_ELEMENTS, _BUCKET_ELEMENTS_A_RANK * copies))
    bucket = elements / buckets
    if layout.distributed_optimizer:
        yield message(dimension, "reduce_scatter", 4 * bucket, buckets, copies, backward=True)
        yield message(dimension, "all_gather", job.bytes * bucket, buckets, copies)
    else:
        yield message(dimension, "all_reduce", 4 * bucket, buckets, copies, backward=True)
