"""Costs of MultiModal-GPT: resampler, and gated blocks in front of some of the decoder's layers.

T rows of a micro-batch (T' on this rank), n images of P tower rows, L latents an image of width C, M = n L, t
tensor-parallel ranks, H hidden_size, i inner width of an attention, b bytes of an element.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping
from typing import TYPE_CHECKING

from parrot_sys.modules.gated_cross_attention import GatedCrossAttentionConfig
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.cost import Cost, Message, Weight, message
from parrot_sys.systems.lora_costs import (
    Linear,
    linear_bytes,
    linear_weights,
    pair_messages,
    update_messages,
    update_work,
)
from parrot_sys.systems.multimodal_gpt.config import FlamingoConfig
from parrot_sys.systems.system_costs import SystemCosts

if TYPE_CHECKING:
    from parrot_sys.systems.layout import Layout
    from parrot_sys.systems.system_costs import Job, MicroBatch

RESAMPLER, BLOCKS = "resampler", "cross_attention"
"""Parts: the resampler; the gated blocks."""


class MultimodalGptCosts(SystemCosts):
    """Resampler on the first stage, gated blocks with their updates in the layers."""

    def image_costs(self, model: ParrotConfig, bypass: Collection[str]) -> list[Cost]:
        """Resampler, with the gated blocks' keys and values of the latents: they depend on the images only."""
        flamingo, width = _flamingo(model), model.vision.hidden_size
        shape = flamingo.resampler
        latents, inner = shape.num_latents, shape.num_attention_heads * shape.head_dim
        rows = model.vision.num_visual_rows + latents
        # Queries and output of the latents, keys and values of all rows, scores and values, the MLP.
        block = 4 * latents * width * inner + 4 * rows * width * inner + 4 * latents * rows * inner
        block += 4 * latents * width * width * shape.ffn_multiplier
        cross = flamingo.cross_attention
        keys_values = 4 * latents * width * cross.num_attention_heads * cross.head_dim
        blocks = model.llm.num_layers // flamingo.every_n_layers
        return [Cost(part=RESAMPLER, image=shape.num_layers * block + blocks * keys_values)]

    def layer_costs(self, model: ParrotConfig, bypass: Collection[str], layer: int) -> list[Cost]:
        """Gated block, which text alone passes, and its updates."""
        if not _has_block(model, layer):
            return []
        cross, hidden = _flamingo(model).cross_attention, model.llm.hidden_size
        latents, inner = _flamingo(model).resampler.num_latents, cross.num_attention_heads * cross.head_dim
        row = 4 * hidden * inner + 4 * latents * inner + 4 * hidden * hidden * cross.ffn_multiplier
        costs = [Cost(part=BLOCKS, row=row, only_beside_images=True)]
        if model.lora is not None:
            rows = sum(update_work(linear, model.lora) for linear in _linears(model) if not linear.whole_rows)
            image = latents * update_work(_keys_values(model), model.lora)
            costs.insert(0, Cost(part="lora", row=rows, image=image, only_beside_images=True))
        return costs

    def layer_kind(self, model: ParrotConfig, layer: int) -> Hashable:
        """Layers with a gated block, and with experts."""
        return super().layer_kind(model, layer), _has_block(model, layer)

    def layer_learns(self, job: Job, layer: int) -> bool:
        """Whether the block or what it reads learns."""
        return _has_block(job.model, layer) and job.learns("vision", RESAMPLER, BLOCKS, "lora")

    def learns_before_attention(self, job: Job, layer: int) -> bool:
        """Whether the block, which is in front, or what it reads learns."""
        return self.layer_learns(job, layer)

    def tensor_sizes(self, model: ParrotConfig) -> Mapping[str, int]:
        """Heads and inner columns of the blocks."""
        cross = _flamingo(model).cross_attention
        return {
            "flamingo.cross_attention.num_attention_heads": cross.num_attention_heads,
            "flamingo.cross_attention.ffn_multiplier x llm.hidden_size": cross.ffn_multiplier * model.llm.hidden_size,
        }

    def weights(self, model: ParrotConfig, layout: Layout) -> Iterator[Weight]:
        """Resampler, whole on every rank."""
        shape, width = _flamingo(model).resampler, model.vision.hidden_size
        inner, count = shape.num_attention_heads * shape.head_dim, shape.num_layers
        yield Weight(RESAMPLER, shape.num_latents * width)
        yield Weight(RESAMPLER, width, 2 * (3 * count + 1))  # norms
        yield Weight(RESAMPLER, inner * width, 2 * count)  # queries, output
        yield Weight(RESAMPLER, 2 * inner * width, count)
        yield Weight(RESAMPLER, width * width * shape.ffn_multiplier, 2 * count)

    def layer_weights(self, model: ParrotConfig, layout: Layout, layer: int) -> Iterator[Weight]:
        """Gated block and its updates."""
        if _has_block(model, layer):
            yield Weight(BLOCKS, 1, 2, replicated=True)  # gates
            yield Weight(BLOCKS, model.llm.hidden_size, 4, replicated=True)  # norms
            for linear in _linears(model):
                yield from linear_weights(linear, model.lora, layout)

    def memory(self, job: Job, batch: MicroBatch) -> tuple[float, int]:
        """Latents of all images."""
        return batch.images * _flamingo(job.model).resampler.num_latents, job.model.vision.hidden_size

    def memory_learns(self, job: Job) -> bool:
        """Whether tower or resampler learns."""
        return job.learns("vision", RESAMPLER)

    def first_bytes(self, job: Job, layout: Layout, batch: MicroBatch) -> float:
        """Resampler: norms and their inputs, inputs of matrices that learn, joint keys and values, queries, output.

        Each rank keeps it for the images that it encodes.
        """
        if not job.learns("vision", RESAMPLER):
            return 0.0
        shape, width, b = _flamingo(job.model).resampler, job.model.vision.hidden_size, job.bytes
        latents, inner, learns = shape.num_latents, shape.num_attention_heads * shape.head_dim, job.learns(RESAMPLER)
        media = job.model.vision.num_visual_rows
        norm, of_matrix = b * width + 8, b * width * learns
        attention = 8 * media + norm * latents + of_matrix * (2 * latents + media)
        attention += b * inner * (2 * (media + latents) + 2 * latents) + 4 * shape.num_attention_heads * latents
        mlp = latents * (norm + of_matrix + b * width * shape.ffn_multiplier * (1 + learns))
        # The features once for all blocks; the first block's latents are a parameter; the last norm.
        image = shape.num_layers * (attention + mlp) + b * width * media + (norm - b * width) * latents
        return layout.local_images(batch.images) * image

    def chunk_bytes(self, job: Job, layout: Layout, batch: MicroBatch, layers: Collection[int]) -> float:
        """Latents, which the blocks share."""
        if not any(self.layer_learns(job, layer) for layer in layers):
            return 0.0
        learns = job.learns(BLOCKS) or (job.learns("lora") and bool(_keys_values(job.model).updates(job.model.lora)))
        rows, width = self.memory(job, batch)
        return job.bytes * rows * width if learns or layout.recompute else 0.0

    def layer_bytes(self, job: Job, layout: Layout, batch: MicroBatch, layer: int) -> float:
        """Gated block: two layer norms, matrices, queries, keys, values and output of its attention, GELU, gates."""
        if not _has_block(job.model, layer) or not batch.images:
            return 0.0
        hidden, b, tensor = job.model.llm.hidden_size, job.bytes, layout.tensor
        cross, (rows, narrow) = _flamingo(job.model).cross_attention, layout.rows_and_narrow(batch.rows)
        inner, heads = cross.num_attention_heads * cross.head_dim / tensor, cross.num_attention_heads / tensor
        latents = self.memory(job, batch)[0]
        to_q, to_kv, to_out, up, down = _linears(job.model)
        kept = 2 * narrow * (b * hidden + 8)
        kept += linear_bytes(to_q, job, layout, rows, narrow)
        kept += linear_bytes(to_kv, job, layout, latents, latents, input_is_kept=True)
        kept += linear_bytes(to_out, job, layout, rows, narrow, input_is_kept=True)
        kept += rows * (2 * b * inner + 8 + 4 * heads) + 2 * b * inner * latents
        kept += linear_bytes(up, job, layout, rows, narrow) + linear_bytes(down, job, layout, rows, narrow)
        kept += b * rows * hidden * cross.ffn_multiplier / tensor
        # Gates that learn keep what they multiply.
        return kept + (2 * b * narrow * hidden if job.learns(BLOCKS) else 0.0)

    def first_messages(self, job: Job, layout: Layout, batch: MicroBatch) -> Iterator[Message]:
        """Context-parallel ranks gather the latents of all images."""
        if layout.context == 1 or not batch.images:
            return
        images = layout.context * layout.local_images(batch.images)
        latents = images * _flamingo(job.model).resampler.num_latents
        payload = job.bytes * latents * job.model.vision.hidden_size
        yield message("context", "all_gather", payload, 1, layout.context)
        if job.learns("vision", RESAMPLER):
            yield message("context", "reduce_scatter", payload, 1, layout.context, backward=True)

    def layer_messages(
        self, job: Job, layout: Layout, batch: MicroBatch, layer: int, *, rows_learn: bool
    ) -> Iterator[Message]:
        """Two pairs of matrices; the gradients of the latents are added up once a stage."""
        if layout.tensor == 1 or not _has_block(job.model, layer) or not batch.images:
            return
        rows = layout.local_rows(batch.rows)
        to_q, to_kv, to_out, up, down = _linears(job.model)
        learns = rows_learn or self.layer_learns(job, layer)
        # The queries' rows carry a gradient also where only the norm before them learns.
        before = rows_learn or job.learns(BLOCKS)
        yield from pair_messages(job, layout, rows, to_q, to_out, rows_learn=before)
        yield from pair_messages(job, layout, rows, up, down, rows_learn=learns)
        latents = self.memory(job, batch)[0]
        yield from update_messages(to_kv, job, layout, latents, rows_learn=self.memory_learns(job))


def _flamingo(model: ParrotConfig) -> FlamingoConfig:
    assert model.flamingo is not None, "the registry chose this system"
    return model.flamingo


def _has_block(model: ParrotConfig, layer: int) -> bool:
    """Whether a block is in front of a layer, from 0."""
    return _flamingo(model).has_block(layer + 1)


def _inner(cross: GatedCrossAttentionConfig) -> int:
    return cross.num_attention_heads * cross.head_dim


def _keys_values(model: ParrotConfig) -> Linear:
    """Keys and values of the latents."""
    outputs = {"to_kv": 2 * _inner(_flamingo(model).cross_attention)}
    return Linear(part=BLOCKS, inputs=model.vision.hidden_size, outputs=outputs, whole_rows=True)


def _linears(model: ParrotConfig) -> tuple[Linear, Linear, Linear, Linear, Linear]:
    """Queries, keys and values, output, and the two of the MLP."""
    cross, hidden = _flamingo(model).cross_attention, model.llm.hidden_size
    inner, ffn = _inner(cross), hidden * cross.ffn_multiplier
    return (
        Linear(part=BLOCKS, inputs=hidden, outputs={"to_q": inner}),
        _keys_values(model),
        Linear(part=BLOCKS, inputs=inner, outputs={"to_out": hidden}, row=True),
        Linear(part=BLOCKS, inputs=hidden, outputs={"ff.1": ffn}),
        Linear(part=BLOCKS, inputs=ffn, outputs={"ff.3": hidden}, row=True),
    )
