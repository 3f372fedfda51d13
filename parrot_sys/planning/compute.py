"""Floating-point operations of a micro-batch on one GPU, and the time they take.

A matrix [rows, k] x [k, n] costs 2 rows k n. The backward pass of a part that learns costs twice its forward pass, of a
frozen part that gradients pass through once, of a frozen part before all that learn nothing: the counting of
`training.metrics.FlopCounter`. On top of that, time has what is computed again (recomputation, logits of the LM head)
and what moves through memory (norms, residuals, rotations, SwiGLU); a layer takes no less than its kernels' launches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from parrot_sys.planning.cluster import ClusterConfig
from parrot_sys.planning.dispatch import Dispatch
from parrot_sys.planning.job import Job, MicroBatch
from parrot_sys.planning.layouts import Layout
from parrot_sys.planning.weights import cut_projector_layers

# Kernels of a decoder layer without fusions beyond norm and attention (forward, backward), counted in the code.
LAYER_KERNELS = (35, 65)
ADAM_BYTES = 90
"""Read and written for an element by our Adam, clipping and the copy to bf16 parameters: 13 list operations in all."""


@dataclass(frozen=True, slots=True)
class Work:
    """Forward and backward pass of one part of the model."""

    forward: float
    backward: float

    def __add__(self, other: Work) -> Work:
        return Work(self.forward + other.forward, self.backward + other.backward)

    @property
    def total(self) -> float:
        """Both passes."""
        return self.forward + self.backward


def model_flops(job: Job, batch: MicroBatch) -> float:
    """Work of a micro-batch over all GPUs as models are rated: no recomputation, causal half of attention."""
    flops = vision_flops(job, batch) * _passes(job, "vision") + projector_flops(job, batch) * _passes(job, "projector")
    if job.moe_active:
        flops += expert_flops(job, batch) * _passes(job, "moe")
    llm = layer_flops(job, batch) + attention_flops(job, batch)
    return flops + _passes(job, "llm") * (job.model.llm.num_layers * llm + head_flops(job, batch))


def _passes(job: Job, component: str) -> int:
    """Forward passes that forward and backward pass together cost."""
    if job.trainable[component]:
        return 3
    return 2 if job.gradient_reaches(component) else 1


def _backward(job: Job, component: str) -> int:
    return _passes(job, component) - 1


def layer_flops(job: Job, batch: MicroBatch) -> float:
    """Matrices of one decoder layer, forward: 2 T H ((2 n + 2 g) d + 3 F)."""
    llm = job.model.llm
    widths = (2 * llm.num_attention_heads + 2 * llm.num_query_groups) * llm.kv_channels + 3 * llm.ffn_hidden_size
    return 2 * batch.rows * llm.hidden_size * widths


def attention_flops(job: Job, batch: MicroBatch) -> float:
    """Scores and values of one layer, forward, the causal half: 2 n d times the sum of squared lengths."""
    llm = job.model.llm
    return 2 * llm.num_attention_heads * llm.kv_channels * batch.squared_lengths


def head_flops(job: Job, batch: MicroBatch) -> float:
    """LM head over label rows, forward: 2 L H vocabulary."""
    return 2 * batch.label_rows * job.model.llm.hidden_size * job.model.llm.vocab_size


def projector_flops(job: Job, batch: MicroBatch) -> float:
    """2 n V H (C + (depth - 1) H)."""
    model = job.model
    size = model.llm.hidden_size
    return 2 * _visual(job, batch) * size * (model.vision.hidden_size + (model.projector.depth - 1) * size)


def expert_flops(job: Job, batch: MicroBatch) -> float:
    """6 n V H I for each expert that works on an image: all of them in dense routing."""
    moe = job.model.moe
    return 6 * _visual(job, batch) * job.model.llm.hidden_size * moe.ffn_hidden_size * job.chosen_experts


def vision_flops(job: Job, batch: MicroBatch) -> float:
    """The tower, forward."""
    return batch.images * job.model.vision.flops


def _visual(job: Job, batch: MicroBatch) -> float:
    return batch.images * job.model.vision.num_visual_rows


def stage_seconds(job: Job, layout: Layout, cluster: ClusterConfig, stage: int, batch: MicroBatch) -> dict[str, Work]:
    """Time of a micro-batch on a rank of pipeline stage `stage`, without communication.

    Rows and images are dealt over context-parallel ranks, matrices cut over tensor-parallel ones.
    """
    work = _decoder_seconds(job, layout, cluster, stage, batch)
    if stage == 0:
        mine = replace(batch, images=layout.local_images(batch.images))
        work["vision"] = _times(job, "vision", cluster.gemm_seconds(vision_flops(job, mine) / _tower_cut(job, layout)))
        work["projector"] = _times(job, "projector", cluster.gemm_seconds(_projector_share(job, layout, mine)))
        if job.moe_active:
            work["experts"] = _expert_seconds(job, layout, cluster, mine)
    if stage == layout.pipeline - 1:
        once = cluster.gemm_seconds(head_flops(job, batch) / (layout.tensor * layout.context))
        # Logits are computed again in the backward pass instead of being kept.
        work["LM head"] = Work(once, once * (1 + _backward(job, "llm")))
    return work


def _projector_share(job: Job, layout: Layout, batch: MicroBatch) -> float:
    """Forward work of a rank: pairs of layers are cut, a last one without a partner is not."""
    whole = job.model.projector.depth - cut_projector_layers(job.model)
    size = job.model.llm.hidden_size
    width = size if job.model.projector.depth > 1 else job.model.vision.hidden_size
    last = 2 * _visual(job, batch) * size * width * whole
    return last + (projector_flops(job, batch) - last) / layout.tensor


def _tower_cut(job: Job, layout: Layout) -> int:
    return 1 if job.model.vision.tower.transformer is None else layout.tensor


def _times(job: Job, component: str, forward: float) -> Work:
    return Work(forward, forward * _backward(job, component))


def _decoder_seconds(
    job: Job, layout: Layout, cluster: ClusterConfig, stage: int, batch: MicroBatch
) -> dict[str, Work]:
    layers, cut = layout.layers(job.model.llm.num_layers, stage), layout.tensor * layout.context
    gemm = cluster.gemm_seconds(layer_flops(job, batch) / cut)
    attention = cluster.attention_seconds(attention_flops(job, batch) / cut)
    moved = _moved_bytes(job, layout, batch)
    elementwise = Work(*(cluster.memory_seconds(nbytes) for nbytes in moved))
    parts = {
        "decoder GEMMs": Work(gemm, gemm * _backward(job, "llm")),
        # Flash attention computes its scores again in the backward pass: five products in place of two.
        "attention": Work(attention, 2.5 * attention),
        "norms, SwiGLU": elementwise,
    }
    launches = Work(*(kernels * cluster.efficiency.kernel_us * 1e-6 for kernels in LAYER_KERNELS))
    sums = sum(parts.values(), Work(0.0, 0.0))
    idle = Work(max(0.0, launches.forward - sums.forward), max(0.0, launches.backward - sums.backward))
    parts["launches"] = idle
    work = {name: Work(layers * part.forward, layers * part.backward) for name, part in parts.items()}
    if layout.recompute:
        work["recomputation"] = Work(0.0, layers * (sums.forward + idle.forward))
    return work


def _moved_bytes(job: Job, layout: Layout, batch: MicroBatch) -> tuple[float, float]:
    """Bytes that memory-bound operations of a decoder layer read and write, forward and backward.

    Forward per row: norms 4 H, residuals 6 H, rotation 9 (n + g) d (four products, two sums, one concatenation of
    halves), SwiGLU 7 F; backward: 12 H, 9 (n + g) d, 13 F.
    """
    llm = job.model.llm
    rows = job.bytes * layout.local_rows(batch.rows)
    narrow = rows / layout.tensor if layout.sequence else rows
    rotated = 9 * (llm.num_attention_heads + llm.num_query_groups) * llm.kv_channels / layout.tensor
    ffn = llm.ffn_hidden_size / layout.tensor
    forward = narrow * 10 * llm.hidden_size + rows * (rotated + 7 * ffn)
    return forward, narrow * 12 * llm.hidden_size + rows * (rotated + 13 * ffn)


def _expert_seconds(job: Job, layout: Layout, cluster: ClusterConfig, batch: MicroBatch) -> Work:
    """Experts; under expert parallelism the rank with the most images decides."""
    moe = job.model.moe
    sent = Dispatch.of(job, layout, batch.images)
    once = cluster.gemm_seconds(expert_flops(job, replace(batch, images=sent.worth)))
    if moe.routing == "topk":
        once *= expected_imbalance(layout.expert, sent.own * layout.expert * layout.expert_tensor * moe.topk)
    # With `recompute` the up-projection, two of the three matrices, runs again.
    again = 2 / 3 * once if moe.recompute and job.gradient_reaches("moe") else 0.0
    return Work(once, once * _backward(job, "moe") + again)


def expected_imbalance(ranks: int, choices: float) -> float:
    """Largest over mean load when `choices` images fall on `ranks` ranks at random, each with the same probability.

    The loads are taken for independent Poisson variables of mean m = choices / ranks: E[max] = sum over k of
    1 - P(load <= k)^ranks. A batch of one language, or a router that prefers some experts, is worse.
    """
    if ranks == 1 or choices <= 0:
        return 1.0
    mean = choices / ranks
    probability, below, expected = math.exp(-mean), 0.0, 0.0
    if probability == 0.0:  # a mean above 700: the normal limit
        return 1 + math.sqrt(2 * math.log(ranks) / mean)
    for load in range(int(mean + 12 * math.sqrt(mean) + 24)):
        below += probability
        expected += 1 - min(below, 1.0) ** ranks
        probability *= mean / (load + 1)
    return expected / mean


def optimizer_seconds(cluster: ClusterConfig, elements: float) -> float:
    """Update of the elements that a rank owns: bound by memory."""
    return cluster.memory_seconds(ADAM_BYTES * elements)
