"""Costs of a decoder layer, as `parrot_sys.megatron.decoder` builds it: work, parameters, activations, messages.

Activations follow Korthikanti et al. (arXiv 2205.05198, section 4) in method: add up what each operation keeps for its
backward pass. The terms are those of this implementation: no dropout masks, no attention matrix, SwiGLU as three
operations.

T rows of a micro-batch (T' on this rank under context parallelism), t tensor-parallel ranks, H hidden_size, n query and
g key/value heads of width d, F ffn_hidden_size, b bytes of an element. Of token-routed experts: E in all, K of a row,
I inner width, e ranks that share them, m ranks that share each.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from parrot_sys.models.llm import LLMConfig
from parrot_sys.modules.lora import LoRAConfig
from parrot_sys.systems.cost import Cost, Message, Operation, Weight, message
from parrot_sys.systems.lora_costs import Linear, linear_bytes, linear_weights, pair_messages, update_work

if TYPE_CHECKING:
    from parrot_sys.systems.layout import Layout
    from parrot_sys.systems.system_costs import Job, MicroBatch


@functools.cache
def attention_linears(llm: LLMConfig) -> tuple[Linear, Linear]:
    """Queries, keys and values together; output."""
    query, key = llm.num_attention_heads * llm.kv_channels, llm.num_query_groups * llm.kv_channels
    joint = Linear(part="llm", inputs=llm.hidden_size, outputs={"q_proj": query, "k_proj": key, "v_proj": key})
    return joint, Linear(part="llm", inputs=query, outputs={"o_proj": llm.hidden_size}, row=True)


@functools.cache
def mlp_linears(llm: LLMConfig) -> tuple[Linear, Linear]:
    """Gate and up together; down."""
    hidden, ffn = llm.hidden_size, llm.ffn_hidden_size
    joint = Linear(part="llm", inputs=hidden, outputs={"gate_proj": ffn, "up_proj": ffn})
    return joint, Linear(part="llm", inputs=ffn, outputs={"down_proj": hidden}, row=True)


def layer_linears(llm: LLMConfig, layer: int) -> tuple[Linear, ...]:
    """All linear layers that may have low-rank updates."""
    return attention_linears(llm) + (() if llm.has_experts(layer) else mlp_linears(llm))


def decoder_layer_cost(llm: LLMConfig, layer: int) -> Cost:
    """Forward work of attention and MLP, or experts."""
    joint, output = attention_linears(llm)
    attention = joint.inputs * sum(joint.outputs.values()) + output.inputs * llm.hidden_size
    heads = llm.num_attention_heads * llm.kv_channels
    # Causal: half, for scores and for values.
    return Cost(part="llm", row=2 * (attention + llm.mlp_weights_of_layer(layer)), pair=2 * heads)


def lora_layer_cost(llm: LLMConfig, lora: LoRAConfig | None, layer: int) -> Cost:
    """Forward work of the updates."""
    return Cost(part="lora", row=sum(update_work(linear, lora) for linear in layer_linears(llm, layer)))


def layer_weights(llm: LLMConfig, lora: LoRAConfig | None, layout: Layout, layer: int) -> Iterator[Weight]:
    """Parameters that a rank has of a layer, with their updates."""
    size, width, tensor = llm.hidden_size, llm.kv_channels, layout.tensor
    yield Weight("llm", size, 2, replicated=True)  # norms
    if llm.qk_norm:
        yield Weight("llm", width, 2, replicated=True, by_heads=True)
    if llm.qkv_bias:
        yield Weight("llm", (llm.num_attention_heads + 2 * llm.num_query_groups) * width // tensor)
    for linear in layer_linears(llm, layer):
        yield from linear_weights(linear, lora, layout)
    if (experts := llm.experts) is not None and llm.has_experts(layer):
        inner = experts.num_experts // layout.expert * experts.ffn_hidden_size // layout.expert_tensor
        # They have buffers of their own wherever several ranks share them.
        apart = layout.expert > 1 or layout.expert_tensor != layout.tensor
        yield Weight("llm", experts.num_experts * size, replicated=True)
        yield Weight("llm", 2 * inner * size, routed=apart)
        yield Weight("llm", inner * size, routed=apart)


def norm_bytes(job: Job, width: int, *, learns: bool) -> float:
    """An RMSNorm for each row: input and 1 / rms; without a fused kernel all in float32, and the normalised row."""
    if job.kernels == "cpu":
        return 4 * width * (2 if learns else 1) + 4
    return job.bytes * width + 4


def layer_bytes(job: Job, layout: Layout, batch: MicroBatch, layer: int, *, attention_learns: bool) -> float:
    """Bytes that a layer keeps.

    Args:
        job: the model as it is trained.
        layout: of the ranks.
        batch: micro-batch.
        layer: number, from 0.
        attention_learns: False where no gradient comes to the layer's attention.
    """
    llm, (rows, narrow) = job.model.llm, layout.rows_and_narrow(batch.rows)
    norm = norm_bytes(job, llm.hidden_size, learns=job.learns("llm"))
    kept = 0.0
    if attention_learns:
        joint, output = attention_linears(llm)
        kept += narrow * norm + linear_bytes(joint, job, layout, rows, narrow)
        kept += rows * (_attention_bytes(job, layout, layer) + _qk_norm_bytes(job, layout))
        kept += linear_bytes(output, job, layout, rows, narrow, input_is_kept=True)
    kept += narrow * norm
    if llm.has_experts(layer):
        return kept + _expert_bytes(job, layout, narrow)
    joint, output = mlp_linears(llm)
    kept += linear_bytes(joint, job, layout, rows, narrow) + linear_bytes(output, job, layout, rows, narrow)
    # Gate and up together, silu(gate), and up once more, to which Megatron adds an offset.
    return kept + rows * job.bytes * 4 * llm.ffn_hidden_size / layout.tensor


def _attention_bytes(job: Job, layout: Layout, layer: int) -> float:
    """Per row: rotated queries and keys, values, output [n d] and log-sum-exp.

    Values are a view of the whole joint projection (n + 2 g) d, unless they are copied: to as many heads as the
    queries have (flash kernel on GPUs), or for the other context-parallel ranks. Attention that also tells its weights
    keeps two numbers more of each head; under context parallelism they are two columns of everything.
    """
    llm, asked = job.model.llm, job.costs.asks_attention(job, layer)
    width = llm.kv_channels
    query, key = llm.num_attention_heads * width, llm.num_query_groups * width
    scalars, elements = 4 * llm.num_attention_heads, float(query + 2 * key + query)
    if layout.context > 1:
        if asked:
            # The output without its two columns is a copy.
            elements += elements * 2 / width + (query if job.learns("llm") else 0)
    elif key < query and job.kernels == "gpu" and not asked:
        elements = query + 2 * query + query
    else:
        elements += query + key
        scalars *= 3 if asked else 1
    return (job.bytes * elements + scalars) / layout.tensor


def _qk_norm_bytes(job: Job, layout: Layout) -> float:
    """Per row: norms of queries, which are copied out of the joint projection, and of keys, which are a view of it."""
    llm = job.model.llm
    if not llm.qk_norm:
        return 0.0
    width, learns = llm.kv_channels, job.learns("llm")
    heads = llm.num_attention_heads + llm.num_query_groups
    kept = heads * norm_bytes(job, width, learns=learns)
    if job.kernels == "gpu" or job.bytes == 4:
        kept -= job.bytes * llm.num_query_groups * width
    return kept / layout.tensor


def _expert_bytes(job: Job, layout: Layout, rows: float) -> float:
    """Router, rows that arrive at this rank's experts (as many as leave it, for each of the m), z [2, I] and SwiGLU."""
    llm, experts = job.model.llm, job.model.llm.experts
    assert experts is not None, "the layer has experts"
    sent, arriving = rows * experts.topk, rows * experts.topk * layout.expert_tensor
    # Rows in float32, which in float32 are the normalised ones; logits, chosen experts and the map of the dispatcher.
    router = 4 * llm.hidden_size * job.learns("llm") + experts.num_experts * (4 + 4 + 1) + 8 * experts.topk
    inner = 3 * experts.ffn_hidden_size / layout.expert_tensor
    return rows * router + 8 * sent + arriving * (job.bytes * (llm.hidden_size + inner) + 4)


def layer_messages(job: Job, layout: Layout, batch: MicroBatch, layer: int, *, rows_learn: bool) -> Iterator[Message]:
    """Messages of a layer's tensor- and context-parallel ranks, and of those that share its experts.

    Args:
        job: the model as it is trained.
        layout: of the ranks.
        batch: micro-batch.
        layer: number, from 0.
        rows_learn: whether the rows that come in carry a gradient.
    """
    llm, (rows, narrow) = job.model.llm, layout.rows_and_narrow(batch.rows)
    attention_learns = rows_learn or job.learns("lora")
    if layout.tensor > 1:
        yield from pair_messages(job, layout, rows, *attention_linears(llm), rows_learn=rows_learn)
        if not llm.has_experts(layer):
            yield from pair_messages(job, layout, rows, *mlp_linears(llm), rows_learn=attention_learns)
    if layout.context > 1:
        # Keys and values of the whole pack are gathered, again for the backward pass, and their gradients dealt back.
        size, width = layout.context, llm.kv_channels + 2 * job.costs.asks_attention(job, layer)
        payload = job.bytes * size * rows * 2 * llm.num_query_groups * width / layout.tensor
        yield message("context", "all_gather", payload, 1, size)
        gathers = attention_learns + int(layout.recompute)
        yield message("context", "all_gather", payload, gathers, size, backward=True)
        yield message("context", "reduce_scatter", payload, int(attention_learns), size, backward=True)
    if llm.has_experts(layer):
        yield from _expert_messages(job, layout, narrow)


def _expert_messages(job: Job, layout: Layout, rows: float) -> Iterator[Message]:
    """Rows and weights to the ranks of their experts, all m of them; the experts' sums back, in float32 over the m.

    Routes are taken for balanced. Counts go ahead.
    """
    experts = job.model.llm.experts
    assert experts is not None, "the layer has experts"
    ranks, shared = layout.expert, layout.expert_tensor
    if ranks * shared == 1:
        return
    sent, size = rows * experts.topk, job.model.llm.hidden_size
    again = int(layout.recompute)
    for backward in (False, True):
        passes = again if backward else 1
        counts = 8 * experts.num_experts * ranks * shared
        yield message("experts", "all_gather", counts, passes, ranks * shared, backward=backward)
        passes += backward  # the gradients take the same ways back
        if ranks > 1:
            for width in (job.bytes * size, 4, job.bytes * size):
                yield message("expert", "all_to_all", sent * width, passes, ranks, backward=backward)
    if shared > 1:
        ways: tuple[Operation, Operation] = ("all_gather", "reduce_scatter")
        for width, there in ((job.bytes * size, True), (4, True), (4 * size, False)):
            payload = shared * sent * width
            way, home = ways if there else reversed(ways)
            yield message("expert_tensor", way, payload, 1, shared)
            yield message("expert_tensor", way, payload, again, shared, backward=True)
            yield message("expert_tensor", home, payload, 1, shared, backward=True)
