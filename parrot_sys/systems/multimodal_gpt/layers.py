"""Gated cross-attention before decoder layers, by ModuleSpec (MultiModal-GPT, arXiv 2305.04790).

The layers get the latents of a micro-batch's images as `context` and what each row reads of them as the `MemoryPlan` in
their `AttentionContext`; how both come through the pipeline is in `memory.py`.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from parrot_sys.errors import ConfigError
from parrot_sys.megatron.attention.context import AttentionContext
from parrot_sys.megatron.attention.memory import MemoryPlan
from parrot_sys.megatron.lean_layer import LeanLayer
from parrot_sys.megatron.lora import with_lora
from parrot_sys.megatron.runtime.backends import parallel_linear_layers
from parrot_sys.modules.gated_cross_attention import GatedCrossAttention, MediaSpans
from parrot_sys.modules.lora import LoRAConfig
from parrot_sys.systems.multimodal_gpt.config import FlamingoConfig


def flamingo_layer_spec(
    spec: ModuleSpec,
    flamingo: FlamingoConfig,
    media_size: int,
    layer_number: int,
    lora: LoRAConfig | None = None,
) -> ModuleSpec:
    """A layer of the decoder, with a gated block in front where there is one.

    Args:
        spec: of the layer without a block.
        flamingo: positions and sizes of the blocks.
        media_size: width of the latents.
        layer_number: of the layer in the whole model, from 1.
        lora: low-rank updates of the block.
    """
    if not flamingo.has_block(layer_number):
        return spec
    params = {"flamingo": flamingo, "media_size": media_size, "lora": lora}
    return ModuleSpec(module=FlamingoLayer, params=params, submodules=spec.submodules)


class FlamingoLayer(LeanLayer):
    """A decoder layer after a gated cross-attention block."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        *,
        flamingo: FlamingoConfig,
        media_size: int,
        lora: LoRAConfig | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            config: of the decoder.
            submodules: of the decoder layer.
            layer_number: on this stage, from 1.
            flamingo: size of the block.
            media_size: width of the latents.
            lora: low-rank updates of the block.
            **kwargs: as Megatron's layer takes them.

        Raises:
            ConfigError: the block cannot be cut over the tensor-parallel ranks.
        """
        super().__init__(config, submodules, layer_number, **kwargs)
        self.gated_cross_attention = _gated_block(flamingo, config, media_size, lora, self.pg_collection)

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        context: Tensor | None = None,
        packed_seq_params: AttentionContext | None = None,
        **kwargs: Any,
    ) -> Any:
        """As Megatron's layer; `context` holds the latents [M, C]."""
        assert packed_seq_params is not None, "the decoder gives each layer its AttentionContext"
        hidden_states = self._read_media(hidden_states, context, packed_seq_params)
        return super().forward(hidden_states, *args, context=context, packed_seq_params=packed_seq_params, **kwargs)

    def _read_media(self, hidden: Tensor, latents: Tensor | None, context: AttentionContext) -> Tensor:
        """Rows [T, 1, H] (under sequence parallelism this rank's part of them) after the block."""
        block, plan = self.gated_cross_attention, context.memory
        assert plan is not None, "the decoder gets a plan for every micro-batch"
        stored = self._stored(latents, context, plan)
        if stored is None:
            return block.passed(hidden)
        start, end = plan.segments[:, 0].unbind(-1)
        spans = MediaSpans(start=start.contiguous(), end=end.contiguous(), active=plan.active)
        active = plan.active
        if self.config.sequence_parallel:
            active = active.chunk(self.tp_group.size())[self.tp_group.rank()]
        return block(hidden, *stored, spans, active)

    def _stored(
        self, latents: Tensor | None, context: AttentionContext, plan: MemoryPlan
    ) -> tuple[Tensor, Tensor] | None:
        """Keys and values of the latents that rows may read; None where no request has an image."""
        attention = self.gated_cross_attention.attention
        if context.paged is not None:
            if not context.paged.any_images:
                return None
            # Where nobody reads an image in this step, the rest of the block is still for all rows beside one.
            if latents is None:
                latents = context.paged.lengths.new_empty(0, plan.width, dtype=self.config.params_dtype)
            return attention.keys_values(latents)
        return attention.keys_values(latents) if latents is not None and plan.rows else None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As Megatron's, which takes the parameters of plain modules for equal on all ranks."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        name = f"{prefix}gated_cross_attention."
        return state | _sharded(self.gated_cross_attention, name, sharded_offsets, metadata)


def _gated_block(
    flamingo: FlamingoConfig,
    config: TransformerConfig,
    media_size: int,
    lora: LoRAConfig | None,
    groups: ProcessGroupCollection,
) -> GatedCrossAttention:
    """The block with its heads and inner columns cut over the tensor-parallel ranks."""
    shape, tp = flamingo.cross_attention, groups.tp
    for name, size in (
        ("num_attention_heads", shape.num_attention_heads),
        ("ffn_multiplier times llm.hidden_size", shape.ffn_multiplier * config.hidden_size),
    ):
        if size % tp.size():
            raise ConfigError(
                f"flamingo.cross_attention.{name} must be a multiple of "
                f"parallel.tensor_model_parallel_size={tp.size()}, got {size}"
            )
    column_parallel, row_parallel = parallel_linear_layers()
    # Latents are whole on each rank, and their gradients are reduced once a stage, for all layers (memory.py).
    whole = copy.copy(config)
    whole.sequence_parallel = False
    projections = iter(("to_q", "to_kv", "to_out", "ff.1", "ff.3"))  # in the order in which the block builds them

    def linear(kind: Any, inputs: int, outputs: int, **settings: Any) -> nn.Module:
        row = kind is row_parallel
        settings |= {"input_is_parallel": True} if row else {"gather_output": False}
        settings = {
            "config": config,
            "bias": False,
            "is_expert": False,
            "skip_bias_add": row,
            "tp_group": tp,
        } | settings
        settings["init_method"] = config.output_layer_init_method if row else config.init_method
        spec = with_lora(kind, lora, (next(projections),), row_parallel=row)
        built: nn.Module = build_module(spec, inputs, outputs, **settings)
        return built

    def memory(inputs: int, outputs: int) -> nn.Module:
        layer: Any = linear(ColumnParallelLinear, inputs, outputs, config=whole, disable_grad_reduce=True)
        if hasattr(layer, "lora"):
            layer.lora.register_forward_pre_hook(partial(_share_gradient, size=tp.size()))
        return layer

    column, row = partial(linear, column_parallel), partial(linear, row_parallel)
    builders: dict[str, Any] = {"column": column, "memory": memory, "row": row}
    block = GatedCrossAttention(shape, config.hidden_size, media_size, dtype=config.params_dtype, **builders)
    parameter: Any
    for name, parameter in block.named_parameters():
        if "norm." in name or name.endswith("_gate"):
            # Each rank sees a part of the rows: partial sums, which Megatron adds up over the tensor-parallel group.
            parameter.sequence_parallel = config.sequence_parallel
    return block


def _share_gradient(_: nn.Module, inputs: tuple[Tensor], *, size: int) -> tuple[Tensor]:
    """LoRA gives each rank the whole gradient of its input; as a partial sum, each counts for one part of `size`."""
    (rows,) = inputs
    if size > 1 and rows.requires_grad and torch.is_grad_enabled():
        rows = rows.view_as(rows)
        rows.register_hook(lambda gradient: gradient / size)
    return (rows,)


def _sharded(
    module: nn.Module, prefix: str, offsets: tuple[Any, ...], metadata: dict[str, Any] | None
) -> dict[str, Any]:
    """Sharded state of a tree of plain modules whose leaves may know how they are cut."""
    own: dict[str, Any] = {}
    module._save_to_state_dict(own, "", keep_vars=True)
    state: dict[str, Any] = make_sharded_tensors_for_checkpoint(own, prefix, {}, offsets)
    child: Any
    for name, child in module.named_children():
        if hasattr(child, "sharded_state_dict"):
            state |= child.sharded_state_dict(f"{prefix}{name}.", offsets, metadata)
        else:
            state |= _sharded(child, f"{prefix}{name}.", offsets, metadata)
    return state
