"""Wings on Megatron layers: modality learners beside each decoder layer, their router and what they remember.

T = s b rows of a pack (our own decoder has b = 1), M rows of the memory (R visual rows and the text rows), H hidden
size, r rank.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.distributed import ProcessGroup

from parrot_sys.errors import ConfigError
from parrot_sys.megatron.attention.context import AttentionContext, ColumnSum
from parrot_sys.megatron.attention.core import CoreAttention
from parrot_sys.megatron.embed.learner_memory import KINDS, LearnerPlan
from parrot_sys.megatron.lean_layer import LeanLayer
from parrot_sys.modules.learners import CUT_DIMS, LearnerRouter, LearnersConfig, LorraLearner
from parrot_sys.modules.rotary import rotary_cos_sin, rotate
from parrot_sys.parallel import copy_to_group, reduce_from_group

Spec = TypeVar("Spec", ModuleSpec, TransformerBlockSubmodules)


def with_learners(spec: Spec, settings: LearnersConfig, *, rope_base: float) -> Spec:
    """A copy of a layer or block spec whose layers have learners where `settings` wants them.

    The learners' router reads the layer's own attention, so the core attention of the layers becomes `CoreAttention`.

    Args:
        spec: of a `TransformerLayer` with causal `SelfAttention`, or a `TransformerBlockSubmodules` of such layers.
        settings: of the learners.
        rope_base: of the rotary embeddings of queries and memory.

    Raises:
        ConfigError: the spec is of something else.
    """
    if isinstance(spec, TransformerBlockSubmodules):
        specs = [with_learners(layer, settings, rope_base=rope_base) for layer in spec.layer_specs or []]
        return dataclasses.replace(spec, layer_specs=specs)
    plain = spec.submodules
    if spec.module not in (TransformerLayer, LeanLayer) or not isinstance(plain, TransformerLayerSubmodules):
        raise ConfigError(f"learners go beside a TransformerLayer's attention, got the spec of {spec.module}")
    submodules = LearnersLayerSubmodules(**{f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)})
    submodules.self_attention = _with_core_attention(plain.self_attention)
    submodules.settings = settings
    submodules.learners = ModuleSpec(module=Learners, params={"settings": settings, "rope_base": rope_base})
    changed = copy.copy(spec)
    changed.module, changed.submodules = LearnersLayer, submodules
    return changed


def _with_core_attention(attention: Any) -> ModuleSpec:
    """A copy of an attention's spec with the core attention that also tells its weights."""
    if not isinstance(attention, ModuleSpec) or attention.module is not SelfAttention:
        got = attention.module if isinstance(attention, ModuleSpec) else attention
        raise ConfigError(f"the router of the learners reads the weights of a SelfAttention, got the spec of {got}")
    mask = (attention.params or {}).get("attn_mask_type", AttnMaskType.causal)
    if mask != AttnMaskType.causal:
        raise ConfigError(f"learners need attn_mask_type {AttnMaskType.causal}, got {mask}")
    changed = copy.copy(attention)
    changed.submodules = dataclasses.replace(attention.submodules, core_attention=CoreAttention)
    return changed


@dataclasses.dataclass
class LearnersLayerSubmodules(TransformerLayerSubmodules):
    """A transformer layer's parts and its learners."""

    settings: LearnersConfig | None = None
    learners: ModuleSpec | None = None


class LearnersLayer(LeanLayer):
    """A transformer layer whose rows also read the memory, between attention and MLP."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: LearnersLayerSubmodules,
        layer_number: int = 1,
        *args: Any,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,
    ) -> None:
        if config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules:
            raise ConfigError(
                "the learners' router reads the weights of the core attention, which cannot be recomputed alone: take "
                'core_attn out of recompute_modules, or set recompute_granularity to "full"'
            )
        if submodules.settings is not None and submodules.settings.layers and not config.hetereogenous_dist_checkpoint:
            raise ConfigError(
                "layers with and without learners are not alike in checkpoints: set hetereogenous_dist_checkpoint=True "
                "in the TransformerConfig (Megatron's spelling), or leave settings.layers unset"
            )
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        super().__init__(config, submodules, layer_number, *args, pg_collection=groups, **kwargs)
        self.learners: Learners | None = None
        if submodules.settings is not None and submodules.settings.has_learners(self.layer_number - 1):
            spec = submodules.learners
            self.learners = build_module(spec, config=config, layer_number=self.layer_number, tp_group=groups.tp)

    def _forward_attention(
        self,
        *args: Any,
        context: Tensor | None = None,
        packed_seq_params: AttentionContext | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if self.learners is None:
            return super()._forward_attention(*args, context=context, packed_seq_params=packed_seq_params, **kwargs)
        if context is None or packed_seq_params is None:
            raise ConfigError(
                "layers with learners need a memory as context and its plan in packed_seq_params: give the model what "
                "parrot_sys.megatron.learner_inputs returns"
            )
        # The layer's own copy: nothing of one layer is left for the next.
        own = copy.copy(packed_seq_params)
        if isinstance(own.memory, LearnerPlan) and own.memory.routed and not self.learners.even:
            own.router = ColumnSum(columns=self.learners.router.columns())
        hidden, _ = super()._forward_attention(*args, packed_seq_params=own, **kwargs)
        return hidden + self.learners(hidden, context, own), context


class Learners(MegatronModule):
    """Visual and textual learner and their router: what is added to the rows after a layer's attention."""

    def __init__(
        self,
        config: TransformerConfig,
        settings: LearnersConfig,
        rope_base: float,
        layer_number: int,
        tp_group: ProcessGroup,
    ) -> None:
        """
        Args:
            config: of the decoder.
            settings: of the learners.
            rope_base: of the rotary embeddings of queries and memory.
            layer_number: of the layer, for the caches.
            tp_group: ranks that share the heads.
        """
        super().__init__(config=config)
        self.layer_number = layer_number
        self.rope_base = rope_base
        self.even = settings.routing == "even"
        self.tp_group = tp_group
        self._shared = tp_group if tp_group.size() > 1 else None
        sizes = (config.hidden_size, config.num_attention_heads, settings.rank)
        self.visual_learner = LorraLearner(*sizes, dtype=config.params_dtype, group=self._shared)
        self.textual_learner = LorraLearner(*sizes, dtype=config.params_dtype, group=self._shared)
        self.router = LearnerRouter(settings.router_positions, dtype=config.params_dtype, group=self._shared)
        for learner in (self.visual_learner, self.textual_learner):
            for name, dim in CUT_DIMS.items() if self._shared else ():
                parameter: Any = learner.get_parameter(name)
                parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, dim, 1

    def forward(self, hidden: Tensor, memory: Tensor | None, context: AttentionContext) -> Tensor:
        """
        Args:
            hidden: [s, b, H] after the layer's attention; under sequence parallelism this rank's part of s.
            memory: [M, H].
            context: of the micro-batch, with the answer of the layer's attention.

        Returns:
            What to add, like `hidden`.
        """
        plan, asked = context.memory, context.router
        assert isinstance(plan, LearnerPlan), "the model plans the memory of its learners"
        assert memory is not None, "a plan comes with a memory"
        batch = hidden.shape[1]
        rows = whole_rows(hidden, self.tp_group, sequence_parallel=self.config.sequence_parallel)
        rotary = self._rotary(context)
        parts = [self._read(0, self.visual_learner, rows, memory, context, rotary)]
        if plan.routed:
            parts.append(self._read(1, self.textual_learner, rows, memory, context, rotary))
        if plan.routed and not self.even:
            assert asked is not None, "the layer has asked its attention"
            assert asked.sums is not None, "and it has answered"
            parts.append(asked.sums)
        # One message for all: r numbers a learner, two for the router; summed in float32.
        widths = [part.shape[1] for part in parts]
        together = _by_place(torch.cat([part.float() for part in parts], dim=1), batch)
        summed = self._summed(together).split(widths, dim=-1)
        ups = [self._own_rows(learner.o_up) for learner in (self.visual_learner, self.textual_learner)]
        read = [F.linear(part.to(up.dtype), up) for part, up in zip(summed, ups, strict=False)]
        if not plan.routed:
            return read[0]
        routed = self._halves(summed[0]) if self.even else self._routed(summed[2])
        visual, textual = self._weights(plan, routed, batch).to(hidden.dtype).split(1, dim=-1)
        return visual * read[0] + textual * read[1]

    def _routed(self, attended: Tensor) -> Tensor:
        weights: Tensor = self.router(attended, shared_bias=self._shared if self.config.sequence_parallel else None)
        return weights

    def _halves(self, like: Tensor) -> Tensor:
        """One half for each learner, with a zero gradient for the router: gradients of all that learns are awaited."""
        unused = 0.0 * (self.router.weight.sum() + self.router.bias.sum())
        return like.new_full((*like.shape[:2], 2), 0.5) + unused.float()

    def _weights(self, plan: LearnerPlan, routed: Tensor, batch: int) -> Tensor:
        """Float32 [s, b, 2], of this rank's rows: those of text alone take the textual learner as it is."""
        active, factors = (_by_place(rows, batch) for rows in (plan.active, plan.factors))
        if self.config.sequence_parallel:
            active, factors = (self._part(rows) for rows in (active, factors))
        alone = torch.arange(2.0, device=routed.device)  # nothing visual, the text as it is
        weights = torch.where(active[..., None], routed * factors, alone)
        plan.keep(self.layer_number, routed.transpose(0, 1).flatten(0, 1))
        return weights

    def _read(
        self,
        kind: int,
        learner: LorraLearner,
        rows: Tensor,
        memory: Tensor,
        context: AttentionContext,
        rotary: tuple[tuple[Tensor, Tensor], list[tuple[Tensor, Tensor]]],
    ) -> Tensor:
        """[T, r], this rank's part of what the rows read of one kind of memory."""
        plan = context.memory
        assert isinstance(plan, LearnerPlan), "the model plans the memory of its learners"
        key, value = learner.key_value(memory.split(plan.kinds)[kind])
        key = rotate(key, *rotary[1][kind])
        query = rotate(learner.query(rows), *rotary[0])
        if kind == 1 and plan.uniform is not None:
            query = torch.where(plan.uniform[:, None, None], 0.0, query)
        if context.paged is not None:
            buffers = context.paged.write(
                (self.layer_number, KINDS[kind]), key, value, plan.source.split(plan.kinds)[kind]
            )
            visible = context.paged.cache.mask(KINDS[kind])
            scale = learner.head_dim**-0.5
            out, _ = context.paged.attend(
                query, buffers, context.cu_seqlens, context.max_seqlen, scale=scale, visible=visible
            )
            return learner.read(out)
        return learner.attend(query, key, value, plan.segments[:, kind])

    def _rotary(self, context: AttentionContext) -> tuple[tuple[Tensor, Tensor], list[tuple[Tensor, Tensor]]]:
        """Rotation of the rows and of each kind of memory; worked out once for all layers."""
        plan = context.memory
        assert isinstance(plan, LearnerPlan), "the model plans the memory of its learners"
        assert plan.positions is not None, "with positions"
        assert context.positions is not None, "the decoder gives them"
        if "rotary" not in plan.scratch:
            width, dtype = self.visual_learner.head_dim, self.config.params_dtype
            of_rows = rotary_cos_sin(context.positions, width, self.rope_base, dtype)
            of_kinds = [rotary_cos_sin(part, width, self.rope_base, dtype) for part in plan.positions.split(plan.kinds)]
            plan.scratch["rotary"] = (of_rows, of_kinds)
        rotary: tuple[tuple[Tensor, Tensor], list[tuple[Tensor, Tensor]]] = plan.scratch["rotary"]
        return rotary

    def _summed(self, parts: Tensor) -> Tensor:
        if self.config.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(parts, group=self.tp_group)
        return reduce_from_group(parts, self._shared)

    def _own_rows(self, parameter: Tensor) -> Tensor:
        """A parameter that each rank uses for rows of its own under sequence parallelism."""
        return copy_to_group(parameter, self._shared if self.config.sequence_parallel else None)

    def _part(self, rows: Tensor) -> Tensor:
        return rows.chunk(self.tp_group.size())[self.tp_group.rank()]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Every tensor with its place in the whole model, for distributed checkpoints."""
        cut = {f"{kind}_learner.{name}": dim for kind in KINDS for name, dim in CUT_DIMS.items()}
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, cut, sharded_offsets
        )
        return state


def whole_rows(hidden: Tensor, tp_group: ProcessGroup, *, sequence_parallel: bool) -> Tensor:
    """[s, b, H], under sequence parallelism a part of s, -> [T, H], all rows, batch entry by batch entry.

    Each rank uses them for its heads: their gradients are partial sums, which the backward pass adds up.
    """
    if sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=tp_group)
    else:
        # (Megatron's own mapping leaves a gradient that is not contiguous as it is: this one is transposed.)
        hidden = copy_to_group(hidden, tp_group if tp_group.size() > 1 else None)
    return hidden.transpose(0, 1).flatten(0, 1)


def _by_place(rows: Tensor, batch: int) -> Tensor:
    """[T, ...] -> [s, b, ...]."""
    return rows.unflatten(0, (batch, -1)).transpose(0, 1)
