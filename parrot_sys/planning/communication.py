"""Messages of a training step: bytes of each parallel dimension, and their time.

Payloads are those of the code: the whole tensor of an all-reduce or all-to-all, the gathered one of an all-gather, the
one that is cut of a reduce-scatter. Of a payload S a rank of n sends 2 (n - 1) / n S in an all-reduce and (n - 1) / n S
in the others (ring algorithms; Thakur et al., 2005), and S to the next pipeline stage. Tensor and sequence parallelism
as in Megatron-LM (arXiv 1909.08053, 2205.05198). Counts of labels and metrics (hundreds of bytes) are left out.

T' rows of a micro-batch on this rank, H hidden_size, L label rows, n images of V rows, b bytes of an element.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from parrot_sys.planning.cluster import ClusterConfig
from parrot_sys.planning.dispatch import Dispatch
from parrot_sys.planning.job import Job, MicroBatch
from parrot_sys.planning.layouts import Layout
from parrot_sys.planning.memory import padded_elements
from parrot_sys.planning.weights import Weight, cut_projector_layers, stage_weights, trainable_weights

_BUCKET_ELEMENTS, _BUCKET_ELEMENTS_A_RANK = 40_000_000, 1_000_000
"""Gradients that Megatron's overlapped reduction sends together."""

_SHAPE_BYTES = 24
"""Sent before each hidden state: packed micro-batches differ in their rows."""

Operation = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """`calls` collectives of one kind with `payload` bytes in all."""

    dimension: str  # of Layout.stride
    operation: Operation
    payload: float
    calls: float
    size: int  # ranks of the group
    backward: bool = False

    @property
    def sent(self) -> float:
        """Bytes that a rank sends."""
        if self.operation == "send":
            return self.payload
        share = (self.size - 1) / self.size
        return self.payload * share * (2 if self.operation == "all_reduce" else 1)

    def seconds(self, layout: Layout, cluster: ClusterConfig) -> float:
        """Time on the links of its group."""
        stride, size = layout.stride(self.dimension), 2 if self.operation == "send" else self.size
        return cluster.collective_seconds(self.sent, size, stride, self.calls)


def micro_batch_messages(job: Job, layout: Layout, stage: int, batch: MicroBatch) -> list[Message]:
    """Messages of one micro-batch on a rank of pipeline stage `stage`."""
    messages: list[Message] = []
    first, last = stage == 0, stage == layout.pipeline - 1
    if layout.tensor > 1:
        messages += _layer_messages(job, layout, stage, batch)
        if first:
            messages += _embedding_messages(job, layout, batch)
        if last:
            messages += _head_messages(job, layout, batch)
    if layout.context > 1:
        messages += _context_messages(job, layout, stage, batch)
    if layout.pipeline > 1:
        messages += _pipeline_messages(job, layout, stage, batch)
    if first and job.moe_active:
        messages += _expert_messages(job, layout, batch)
    return messages


def _layer_messages(job: Job, layout: Layout, stage: int, batch: MicroBatch) -> Iterator[Message]:
    """Two sums over the ranks in each direction of a layer; halves of them before and after the matrices under SP.

    Under sequence parallelism a matrix keeps its own rows only, so that the gradients of the two column-parallel ones
    need their input gathered once more; recomputation repeats the forward pass.
    """
    size, layers = layout.tensor, layout.layers(job.model.llm.num_layers, stage)
    payload = job.bytes * layout.local_rows(batch.rows) * job.model.llm.hidden_size
    forwards = 2 if layout.recompute else 1
    if not layout.sequence:
        calls = 2 * layers
        yield _message("tensor", "all_reduce", payload, calls, size)
        yield _message("tensor", "all_reduce", payload, calls * forwards, size, backward=True)
        return
    calls = 2 * layers
    for operation in ("all_gather", "reduce_scatter"):
        yield _message("tensor", operation, payload, calls, size)
    again = forwards - 1
    gathers = calls * (1 + again + job.trainable["llm"])
    yield _message("tensor", "all_gather", payload, gathers, size, backward=True)
    yield _message("tensor", "reduce_scatter", payload, calls * (1 + again), size, backward=True)


def _embedding_messages(job: Job, layout: Layout, batch: MicroBatch) -> Iterator[Message]:
    """Rows of a cut vocabulary are added up; the tower, cut by heads, sums twice in each block, the projector for two
    layers."""
    vision, size = job.model.vision, layout.tensor
    row = job.bytes * job.model.llm.hidden_size
    visual = layout.local_images(batch.images) * vision.num_visual_rows
    for first in range(0, cut_projector_layers(job.model), 2):
        yield _message("tensor", "all_reduce", visual * row, 1, size)
        if first and job.gradient_reaches("projector"):
            yield _message("tensor", "all_reduce", visual * row, 1, size, backward=True)
        if not first and job.trainable["vision"]:
            yield _message("tensor", "all_reduce", job.bytes * visual * vision.hidden_size, 1, size, backward=True)
    yield _message("tensor", "all_reduce", batch.rows * row, 1, size)
    if layout.sequence:
        yield _message("tensor", "all_gather", layout.local_rows(batch.rows) * row, 1, size, backward=True)
    if vision.tower.transformer is not None and batch.images:
        features = job.bytes * layout.local_images(batch.images) * vision.num_tower_rows * vision.hidden_size
        calls = 2 * vision.num_layers_run
        yield _message("tensor", "all_reduce", features, calls, size)
        if job.trainable["vision"]:
            yield _message("tensor", "all_reduce", features, calls, size, backward=True)


def _head_messages(job: Job, layout: Layout, batch: MicroBatch) -> Iterator[Message]:
    """All rows reach every rank's part of the vocabulary; three numbers a label make the loss."""
    size = layout.tensor
    rows = job.bytes * layout.local_rows(batch.rows) * job.model.llm.hidden_size
    if layout.sequence:
        yield _message("tensor", "all_gather", rows, 1, size)
        yield _message("tensor", "reduce_scatter", rows, 1, size, backward=True)
    else:
        yield _message("tensor", "all_reduce", rows, 1, size, backward=True)
    yield _message("tensor", "all_reduce", 6 * batch.label_rows / layout.context, 2, size)


def _context_messages(job: Job, layout: Layout, stage: int, batch: MicroBatch) -> Iterator[Message]:
    """Keys and values of the whole pack are gathered, again for the backward pass, and their gradients dealt back.

    On the first stage so are the images, which were encoded and routed on one rank each.
    """
    llm, size = job.model.llm, layout.context
    layers = layout.layers(llm.num_layers, stage)
    rows = size * layout.local_rows(batch.rows)
    payload = job.bytes * rows * 2 * llm.num_query_groups * llm.kv_channels / layout.tensor
    yield _message("context", "all_gather", payload, layers, size)
    gathers = layers * (2 if layout.recompute else 1)
    yield _message("context", "all_gather", payload, gathers, size, backward=True)
    yield _message("context", "reduce_scatter", payload, layers, size, backward=True)
    if stage == 0 and batch.images:
        images = size * layout.local_images(batch.images)
        features = job.bytes * images * job.model.vision.num_visual_rows * llm.hidden_size
        yield _message("context", "all_gather", features, 1, size)
        if job.gradient_reaches("moe"):
            yield _message("context", "reduce_scatter", features, 1, size, backward=True)


def _pipeline_messages(job: Job, layout: Layout, stage: int, batch: MicroBatch) -> Iterator[Message]:
    """Hidden states to the next stage, their gradients to the one before; once for each chunk of layers."""
    rows = job.bytes * layout.local_rows(batch.rows) * job.model.llm.hidden_size
    if layout.sequence:
        rows /= layout.tensor
    rows += _SHAPE_BYTES
    # With chunks the last stage hands on to the first.
    sends = layout.virtual - (stage == layout.pipeline - 1)
    receives = layout.virtual - (stage == 0)
    if sends:
        yield _message("pipeline", "send", rows, sends, layout.pipeline)
    if receives:
        yield _message("pipeline", "send", rows, receives, layout.pipeline, backward=True)


def _expert_messages(job: Job, layout: Layout, batch: MicroBatch) -> Iterator[Message]:
    """Whole images and their weights to the ranks of their experts, the experts' sums back; the same for gradients."""
    moe, way = job.model.moe, Dispatch.of(job, layout, layout.local_images(batch.images))
    image = job.bytes * job.model.vision.num_visual_rows * job.model.llm.hidden_size
    # Bytes of what goes there, and whether its gradients come back.
    there = ((image, job.gradient_reaches("projector")), (4 * moe.num_experts, job.gradient_reaches("moe")))
    ranks = layout.expert * layout.expert_tensor
    if way.way == "in_place":
        yield _message("experts", "all_reduce", image * way.images, 1, ranks)
        for size, learns in there:
            if learns:
                yield _message("experts", "all_reduce", size * way.images, 1, ranks, backward=True)
        return
    if layout.tensor > 1:  # the ranks split the images before, and gather the results after
        whole = way.own * layout.tensor
        yield _message("tensor", "all_gather", image * whole, 1, layout.tensor)
        for size, learns in there:
            if learns:
                yield _message("tensor", "all_gather", size * whole, 1, layout.tensor, backward=True)
    if ranks == 1:
        return
    counts = 1 if way.way == "gathered" else 2 * layout.expert
    yield _message("experts", "all_gather", 8 * counts * ranks, 1, ranks)
    for size, learns in there:
        yield from _travel(layout, way, size, there=True)
        if learns:
            yield from _travel(layout, way, size, there=False, backward=True)
    yield from _travel(layout, way, image, there=False)
    if job.gradient_reaches("moe"):
        yield from _travel(layout, way, image, there=True, backward=True)


def _travel(layout: Layout, way: Dispatch, size: float, *, there: bool, backward: bool = False) -> Iterator[Message]:
    """Cost of `size` bytes per image on the way to the experts, or of their sums on the way back."""
    operation: Operation = "all_gather" if there else "reduce_scatter"
    if way.way == "gathered":
        ranks = layout.expert * layout.expert_tensor
        yield _message("experts", operation, size * way.arriving, 1, ranks, backward=backward)
        return
    yield _message("expert", "all_to_all", size * way.sent, 1, layout.expert, backward=backward)
    if layout.expert_tensor > 1:
        slices = layout.expert_tensor
        yield _message("expert_tensor", operation, size * way.arriving, 1, slices, backward=backward)


def step_messages(job: Job, layout: Layout, stage: int) -> list[Message]:
    """Messages once a step: gradients, with the distributed optimizer updated parameters, and shared parameters."""
    learning = trainable_weights(job, stage_weights(job.model, layout, stage))
    messages: list[Message] = []
    for routed in (False, True):
        messages += _gradient_messages(job, layout, [weight for weight in learning if weight.routed == routed], routed)
    if layout.sequence:
        elements = sum(weight.total for weight in learning if weight.replicated)
        messages.append(_message("tensor", "all_reduce", 4 * elements, 1, layout.tensor, backward=True))
    ends = stage in (0, layout.pipeline - 1)
    if job.model.llm.tie_word_embeddings and layout.pipeline > 1 and ends and job.trainable["llm"]:
        shared = 4 * job.model.llm.vocab_size // layout.tensor * job.model.llm.hidden_size
        messages.append(_message("pipeline", "all_reduce", shared, 1, 2, backward=True))
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
        yield _message(dimension, "reduce_scatter", 4 * bucket, buckets, copies, backward=True)
        yield _message(dimension, "all_gather", job.bytes * bucket, buckets, copies)
    else:
        yield _message(dimension, "all_reduce", 4 * bucket, buckets, copies, backward=True)


def _message(
    dimension: str, operation: Operation, payload: float, calls: float, size: int, *, backward: bool = False
) -> Message:
    """`calls` messages of `payload` bytes each."""
    return Message(
        dimension=dimension, operation=operation, payload=payload * calls, calls=calls, size=size, backward=backward
    )


def total_seconds(messages: Iterable[Message], layout: Layout, cluster: ClusterConfig) -> float:
    """Time of messages one after the other."""
    return sum(message.seconds(layout, cluster) for message in messages)
