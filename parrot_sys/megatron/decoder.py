"""The decoder (Qwen2, LLaMA) on Megatron-Core's `GPTModel`: packed rows in; losses, or logits of chosen rows, out."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules, get_transformer_layer_offset
from torch import Tensor

from parrot_sys.errors import ConfigError
from parrot_sys.megatron.attention.context import AttentionContext, make_context
from parrot_sys.megatron.attention.core import CoreAttention
from parrot_sys.megatron.attention.memory import MemoryMessage, MemoryPlan
from parrot_sys.megatron.attention.paged import PagedRows
from parrot_sys.megatron.embed.moe_layer import moe_layer_spec
from parrot_sys.megatron.lean_layer import LeanLayer, run_layers
from parrot_sys.megatron.lora import QKV, with_lora
from parrot_sys.megatron.norms import Norm
from parrot_sys.megatron.runtime.backends import parallel_linear_layers
from parrot_sys.megatron.runtime.compat import mlp_submodule
from parrot_sys.models.llm import LLMConfig
from parrot_sys.modules.lora import LoRAConfig
from parrot_sys.modules.rotary import rotary_cos_sin, turning
from parrot_sys.ops import few_rows_linear, linear_cross_entropy, linear_cross_entropy_parts
from parrot_sys.ops.few_rows_linear import takes_few_rows
from parrot_sys.parallel import RowSplit, combine_vocab_parts, share_pack

_MOST_TURNS = 2**15
"""Positions whose rotations are kept in a table: 24 MB for heads of 128 columns in half precision."""


def layer_spec(
    attn_mask_type: AttnMaskType = AttnMaskType.causal,
    *,
    lora: LoRAConfig | None = None,
    qk_norm: bool = False,
    token_experts: bool = False,
) -> ModuleSpec:
    """A pre-norm transformer layer with our norm and core attention; sizes, biases, activation come from the config.

    Args:
        attn_mask_type: who sees whom.
        lora: low-rank updates of the linear layers.
        qk_norm: norms of queries and keys.
        token_experts: experts that each row chooses for itself, in the place of the MLP.
    """
    column_parallel, row_parallel = parallel_linear_layers()
    return ModuleSpec(
        module=LeanLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": attn_mask_type},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=with_lora(column_parallel, lora, QKV),
                    core_attention=CoreAttention,
                    linear_proj=with_lora(row_parallel, lora, ("o_proj",), row_parallel=True),
                    # Each tensor-parallel rank sees its own heads: Megatron adds up these gradients by name.
                    q_layernorm=Norm if qk_norm else IdentityOp,
                    k_layernorm=Norm if qk_norm else IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm,
            mlp=moe_layer_spec()
            if token_experts
            else mlp_submodule(
                MLPSubmodules(
                    linear_fc1=with_lora(column_parallel, lora, ("gate_proj", "up_proj")),
                    linear_fc2=with_lora(row_parallel, lora, ("down_proj",), row_parallel=True),
                )
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


class OutputHead(ColumnParallelLinear):
    """The LM head: losses of label rows without their logits, or logits of chosen rows.

    `GPTModel` builds its output layer itself; `Decoder` turns it into this class. It stays a module that is
    *called*, because overlapped parameter gathering hangs on the forward hooks of the module that owns the weight.
    """

    def forward(self, hidden: Tensor, targets: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """
        Args:
            hidden: [L, H], all rows on each tensor-parallel rank.
            targets: int64 [L] for losses, None for logits.
            weight: [vocabulary of this rank, H] when it is shared with the embedding.

        Returns:
            Losses, float32 [L], or logits [L, vocabulary].
        """
        weight = self.weight if weight is None else weight
        if targets is None:
            few = not torch.is_grad_enabled() and takes_few_rows(hidden)
            logits = few_rows_linear(hidden, weight) if few else F.linear(hidden, weight)
            alone = self.tp_group.size() == 1
            return logits if alone else gather_from_tensor_model_parallel_region(logits, group=self.tp_group)
        if self.tp_group.size() == 1:
            return linear_cross_entropy(hidden, weight, targets)
        start = self.tp_group.rank() * weight.shape[0]
        parts = linear_cross_entropy_parts(hidden, weight, targets, vocab_start=start)
        return combine_vocab_parts(*parts, self.tp_group)


class Decoder(GPTModel):
    """RMSNorm, SwiGLU, RoPE, grouped-query attention over packed samples (Qwen2, arXiv 2407.10671; LLaMA).

    `embed` looks word embeddings up; `forward` takes them with the visual rows already in place.
    """

    def __init__(
        self,
        llm: LLMConfig,
        config: TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        spec_of_layer: Callable[[int], ModuleSpec] | None = None,
    ) -> None:
        """
        Args:
            llm: sizes and constants.
            config: the same for Megatron.
            pg_collection: process groups.
            pre_process: this part has the embeddings.
            post_process: this part has the LM head.
            vp_stage: chunk number under the interleaved pipeline schedule.
            spec_of_layer: spec of a layer by its number in the whole model, from 1; by default a plain one.
        """
        layers = get_num_layers_to_build(config, vp_stage, pg_collection.pp.rank())
        first = get_transformer_layer_offset(config, vp_stage, pg_collection.pp.rank()) + 1
        spec_of = spec_of_layer or (
            lambda number: layer_spec(qk_norm=llm.qk_norm, token_experts=llm.has_experts(number - 1))
        )
        super().__init__(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules(
                layer_specs=[spec_of(first + i) for i in range(layers)], layer_norm=Norm
            ),
            vocab_size=llm.vocab_size,
            max_sequence_length=llm.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=llm.tie_word_embeddings,
            # Our core attention rotates; the embedding is cut along the rows only after images are in place.
            position_embedding_type="none",
            scatter_embedding_sequence_parallel=False,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        self.llm = llm
        self._memory = MemoryMessage(config.hidden_size, pg_collection.tp, sequence_parallel=config.sequence_parallel)
        self._received: Tensor | None = None
        self._table: tuple[Tensor, Tensor] | None = None
        """Rotations of all positions, see `_turns`."""
        if post_process:
            self.output_layer.__class__ = OutputHead

    @property
    def layers(self) -> torch.nn.ModuleList:
        """Layers of this rank, where Megatron's schedules look for them in a model whose `decoder` this is."""
        return self.decoder.layers

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Takes what the previous pipeline stage sent: hidden states followed by the memory."""
        self._received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def embed(self, input_ids: Tensor) -> Tensor:
        """Word embeddings: int64 [T] -> [T, H]. Rows with a negative id (images) get those of id 0, to be replaced."""
        ids = input_ids.clamp(min=0)
        if not (self.training or torch.is_grad_enabled()) and self.pg_collection.tp.size() == 1:
            return F.embedding(ids, self.embedding.word_embeddings.weight)
        return self.embedding(input_ids=ids.unsqueeze(0), position_ids=None).squeeze(1)

    def forward(
        self,
        embeddings: Tensor | None,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        *,
        label_rows: Tensor | None = None,
        targets: Tensor | None = None,
        logits_rows: Tensor | None = None,
        paged: PagedRows | None = None,
        split: RowSplit | None = None,
        memory: Tensor | None = None,
        memory_plan: MemoryPlan | None = None,
    ) -> Tensor:
        """Losses of the label rows, or logits when there are no targets.

        Under context parallelism each rank is given the whole pack and runs its layers on its own rows.

        Args:
            embeddings: [T, H] on the first pipeline stage, None on the others.
            position_ids: int64 [T].
            cu_seqlens: int32 [S + 1].
            max_seqlen: longest sample.
            label_rows: int64 [L], rows whose losses are wanted; all on this rank when there is a `split`.
            targets: int64 [L].
            logits_rows: int64 rows whose logits are wanted; all rows when None.
            paged: places of the rows in a paged cache, which is written to.
            split: how the rows are dealt over the context-parallel ranks; None without them.
            memory: [M, W] on the first pipeline stage, whole on each tensor-parallel rank; None on the others. Layers
                get it as `context`.
            memory_plan: with a memory, on every stage; for the whole pack.

        Returns:
            float32 [L], or logits [rows, vocabulary], or what the next pipeline stage receives: hidden states
            [T, 1, H] followed by the memory.

        Raises:
            ConfigError: logits or a cache are asked for under context parallelism.
        """
        self._check_split(split, wants_losses=targets is not None, cached=paged is not None)
        num_rows = position_ids.numel()
        if padding := self._padding(num_rows) if split is None else split.padding:
            position_ids = F.pad(position_ids, (0, padding))
            cu_seqlens = torch.cat((cu_seqlens, cu_seqlens[-1:] + padding))
            max_seqlen = max(max_seqlen, padding)
        if memory_plan is not None:
            memory_plan = memory_plan.padded(padding)
        context = self._context(position_ids, cu_seqlens, max_seqlen, paged, split, memory_plan)
        hidden, message = self._inputs(embeddings, memory, memory_plan, padding, split)
        # (Layers may not change it: what they return in its place is not looked at.)
        memory = None if message is None or memory_plan is None else self._memory.unpack(message, memory_plan)
        if paged is not None and not torch.is_grad_enabled():
            hidden = run_layers(self.decoder, hidden, memory, context)
        else:
            hidden = self.decoder(hidden_states=hidden, attention_mask=None, context=memory, packed_seq_params=context)
        if not self.post_process:
            return hidden if message is None else self._memory.append(hidden, message)
        return self._head(hidden, num_rows, label_rows if targets is not None else logits_rows, targets, split)

    def _head(
        self, hidden: Tensor, num_rows: int, rows: Tensor | None, targets: Tensor | None, split: RowSplit | None
    ) -> Tensor:
        """Losses or logits of `rows` (all when None) of a pack of `num_rows`."""
        hidden = self._from_layers(hidden)
        if split is None:
            hidden = hidden[:num_rows]
        elif rows is not None:
            rows = split.local_index(rows)
        if rows is not None:
            hidden = hidden.index_select(0, rows)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(hidden, targets, weight)

    def hidden_shape(self, num_rows: int, memory_plan: MemoryPlan | None = None) -> tuple[int, int, int]:
        """Shape of what goes between pipeline stages for a micro-batch of `num_rows` rows and its memory."""
        parts = self.pg_collection.tp.size() if self.config.sequence_parallel else 1
        rows = (num_rows + self._padding(num_rows)) // parts
        if memory_plan is not None:
            rows += self._memory.num_rows(memory_plan)
        return rows, 1, self.config.hidden_size

    def _inputs(
        self,
        embeddings: Tensor | None,
        memory: Tensor | None,
        plan: MemoryPlan | None,
        padding: int,
        split: RowSplit | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Hidden states and the memory's message, made here on the first stage and received on the others."""
        if self.pre_process:
            assert embeddings is not None, "the first stage has the embeddings"
            hidden = self._to_layers(embeddings, padding, split)
            return hidden, None if memory is None or plan is None else self._memory.pack(memory, plan)
        received, self._received = self._received, None
        message = None
        if received is not None and plan is not None:
            received, message = self._memory.split(received, plan)
        self.decoder.set_input_tensor(received)
        return None, message

    def _padding(self, num_rows: int) -> int:
        """Rows to add at the end, as a sample of their own.

        Sequence parallelism needs as many rows on each rank, and Megatron's layers at least one: an empty micro-batch
        still runs them, so that every parameter gets its (zero) gradient.
        """
        unit = self.pg_collection.tp.size() if self.config.sequence_parallel else 1
        return -num_rows % unit if num_rows else unit

    def _check_split(self, split: RowSplit | None, *, wants_losses: bool, cached: bool) -> None:
        size = self.pg_collection.cp.size()
        if size != (1 if split is None else split.size):
            raise ConfigError(
                f"the rows of the pack must be dealt over {size} context-parallel ranks, got "
                f"{'a whole pack' if split is None else f'a split over {split.size}'}: give the decoder RowSplit.of("
                "rows, ranks)"
            )
        if size > 1 and (cached or not wants_losses):
            raise ConfigError(
                f"context parallelism gives losses for training only, got context_parallel_size={size} for "
                f"{'a KV cache' if cached else 'logits'}: evaluate and generate with context_parallel_size 1"
            )

    def _context(
        self,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        paged: PagedRows | None,
        split: RowSplit | None,
        memory: MemoryPlan | None,
    ) -> AttentionContext:
        """Facts about the padded pack that all layers need; made once."""
        shared = None
        if split is not None:
            shared = share_pack(split, self.pg_collection.cp, cu_seqlens)
            position_ids = split.take(position_ids, self.pg_collection.cp.rank())
            memory = None if memory is None else memory.for_rank(split, self.pg_collection.cp.rank())
        dtype = self.config.params_dtype
        return make_context(
            cu_seqlens,
            max_seqlen,
            dtype=dtype,
            rotary=self._rotary(position_ids) if paged is None else None,
            turns=None if paged is None else self._turns(position_ids),
            paged=paged,
            shared=shared,
            memory=memory,
            positions=position_ids,
        )

    def _rotary(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        llm, config = self.llm, self.config
        return rotary_cos_sin(position_ids, config.kv_channels, llm.rope_base, config.params_dtype, llm.rope_scaling)

    def _turns(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The rotations of a step over a paged cache: looked up, where the table of all positions is small."""
        if self.llm.max_position_embeddings > _MOST_TURNS:
            return turning(*self._rotary(position_ids))
        if self._table is None or self._table[0].device != position_ids.device:
            positions = torch.arange(self.llm.max_position_embeddings, device=position_ids.device)
            with torch.inference_mode(False):  # the next call may be outside of it
                self._table = turning(*self._rotary(positions))
        cos, sin = self._table
        return cos.index_select(0, position_ids), sin.index_select(0, position_ids)

    def _to_layers(self, embeddings: Tensor, padding: int, split: RowSplit | None) -> Tensor:
        hidden = F.pad(embeddings, (0, 0, 0, padding)) if padding else embeddings
        if split is not None:
            hidden = split.take(hidden, self.pg_collection.cp.rank())
        hidden = hidden.unsqueeze(1)
        if self.config.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden, group=self.pg_collection.tp)
        if self.config.recompute_granularity and torch.is_grad_enabled() and not hidden.requires_grad:
            # Recomputed layers get gradients only if their input does; with LoRA, all that comes before may be frozen.
            hidden.requires_grad_()
        return hidden

    def _from_layers(self, hidden: Tensor) -> Tensor:
        # Each rank multiplies with its part of the vocabulary, so the gradients of the rows are partial sums: reduced
        # by the backward pass of either call.
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=self.pg_collection.tp
            )
        elif torch.is_grad_enabled():
            hidden = copy_to_tensor_model_parallel_region(hidden, group=self.pg_collection.tp)
        return hidden.squeeze(1)
