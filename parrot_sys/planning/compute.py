"""Floating-point operations of a micro-batch on one GPU, and the time they take.

Counted as the trainer counts them (`systems/flops.py`). On top of that, time has what is computed again (recomputation,
logits of the LM head) and what moves through memory (norms, residuals, rotations, SwiGLU); a layer takes no less than
its kernels' launches.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

from parrot_sys.planning.cluster import ClusterConfig
from parrot_sys.systems.cost import Cost, Work
from parrot_sys.systems.decoder_costs import decoder_layer_cost, lora_layer_cost
from parrot_sys.systems.flops import costs
from parrot_sys.systems.layout import Layout
from parrot_sys.systems.system_costs import Job, MicroBatch

# Kernels of a decoder layer without fusions beyond norm and attention (forward, backward), counted in the code.
LAYER_KERNELS = (35, 65)
ADAM_BYTES = 90
"""Read and written for an element by our Adam, clipping and the copy to bf16 parameters: 13 list operations in all."""


def model_flops(job: Job, batch: MicroBatch) -> float:
    """Work of a micro-batch over all GPUs as models are rated: no recomputation, causal half of attention."""
    flops = job.passes["vision"] * batch.images * job.model.vision.flops
    return flops + sum(job.passes[cost.part] * forward_flops(cost, batch) for cost in costs(job.model, job.bypass))


def forward_flops(cost: Cost, batch: MicroBatch) -> float:
    """Forward work of a part on a micro-batch."""
    if cost.only_beside_images and not batch.images:
        return 0.0
    rows = batch.rows * cost.row + batch.squared_lengths * cost.pair
    return rows + batch.label_rows * cost.label + batch.images * cost.image


def stage_seconds(job: Job, layout: Layout, cluster: ClusterConfig, stage: int, batch: MicroBatch) -> dict[str, Work]:
    """Time of a micro-batch on a rank of pipeline stage `stage`, without communication.

    Rows and images are dealt over context-parallel ranks, matrices cut over tensor-parallel ones.
    """
    work: dict[str, Work] = {}
    for layer, count in Counter(itertools.chain(*layout.layers(job.kinds, stage))).items():
        for name, part in _layer_seconds(job, layout, cluster, layer, batch).items():
            work[name] = work.get(name, Work(0.0, 0.0)) + part * count
    if stage == 0:
        mine = replace(batch, images=layout.local_images(batch.images))
        tower = cluster.gemm_seconds(mine.images * job.model.vision.flops / _tower_cut(job, layout))
        work["vision"] = Work(1, job.backward("vision")) * tower
        for name, part in job.costs.image_work(job, layout, mine).items():
            work[name] = part * cluster.gemm_seconds(1)
    if stage == layout.pipeline - 1:
        head = 2 * batch.label_rows * job.model.llm.hidden_size * job.model.llm.vocab_size
        once = cluster.gemm_seconds(head / (layout.tensor * layout.context))
        # Logits are computed again in the backward pass instead of being kept.
        work["LM head"] = Work(once, once * (1 + job.backward("llm")))
    return work


def _tower_cut(job: Job, layout: Layout) -> int:
    return 1 if job.model.vision.tower.transformer is None else layout.tensor


def _layer_seconds(job: Job, layout: Layout, cluster: ClusterConfig, layer: int, batch: MicroBatch) -> dict[str, Work]:
    """Time of a decoder layer with all that is inside it."""
    llm, cut = job.model.llm, layout.tensor * layout.context
    names = {"llm": "decoder GEMMs", "lora": "low-rank updates"}
    parts: dict[str, Work] = {}
    attention = 0.0
    own = [decoder_layer_cost(llm, layer), lora_layer_cost(llm, job.model.lora, layer)]
    for cost in [*own, *job.costs.layer_costs(job.model, job.bypass, layer)]:
        attention += cluster.attention_seconds(batch.squared_lengths * cost.pair / cut)
        flops = forward_flops(replace(cost, pair=0.0), batch) / cut
        time = Work(1, job.backward(cost.part) if flops else 0) * cluster.gemm_seconds(flops)
        name = names.get(cost.part, cost.part.replace("_", " "))
        parts[name] = parts.get(name, Work(0.0, 0.0)) + time
    # Flash attention computes its scores again in the backward pass: five products in place of two.
    parts["attention"] = Work(attention, 2.5 * attention)
    moved = _moved_bytes(job, layout, layer, batch)
    parts["norms, SwiGLU"] = Work(*(cluster.memory_seconds(nbytes) for nbytes in moved))
    launches = Work(*(kernels * cluster.efficiency.kernel_us * 1e-6 for kernels in LAYER_KERNELS))
    sums = sum(parts.values(), Work(0.0, 0.0))
    idle = Work(max(0.0, launches.forward - sums.forward), max(0.0, launches.backward - sums.backward))
    parts["launches"] = idle
    if layout.recompute:
        parts["recomputation"] = Work(0.0, sums.forward + idle.forward)
    return parts


def _moved_bytes(job: Job, layout: Layout, layer: int, batch: MicroBatch) -> tuple[float, float]:
    """Bytes that memory-bound operations of a decoder layer read and write, forward and backward.

    Forward per row: norms 4 H, residuals 6 H, rotation 9 (n + g) d (four products, two sums, one concatenation of
    halves), SwiGLU 7 F; backward: 12 H, 9 (n + g) d, 13 F. Of experts F is what the K experts of a row have together,
    and each row is copied there and back: 4 K H in both passes.
    """
    llm = job.model.llm
    rows, narrow = (job.bytes * each for each in layout.rows_and_narrow(batch.rows))
    rotated = 9 * (llm.num_attention_heads + llm.num_query_groups) * llm.kv_channels / layout.tensor
    ffn = llm.ffn_hidden_size / layout.tensor
    if llm.experts is not None and llm.has_experts(layer):
        ffn = llm.experts.topk * (llm.experts.ffn_hidden_size + 4 / 7 * llm.hidden_size) / layout.tensor
    forward = narrow * 10 * llm.hidden_size + rows * (rotated + 7 * ffn)
    return forward, narrow * 12 * llm.hidden_size + rows * (rotated + 13 * ffn)


def optimizer_seconds(cluster: ClusterConfig, elements: float) -> float:
    """Update of the elements that a rank owns: bound by memory."""
    return cluster.memory_seconds(ADAM_BYTES * elements)
