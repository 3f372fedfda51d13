"""Transformer layers that run the rows of a step over a paged cache without Megatron's Python between the products.

A step of answers has few rows, so the host decides how long it takes: one layer of Megatron's modules makes some 40
calls of torch and 60 of Python. `LeanLayer` is Megatron's layer with its parameters and names; for a step over a paged
cache, without gradients, it multiplies by the weights itself. Each part for itself: what it does not know (low-rank
updates, experts, other norms, layers of an accelerator, hooks, sums over tensor-parallel ranks) it calls as a module.
Few rows on a CPU through a layer of which it knows every part are one call, `paged_layer`.

T rows, H hidden size, g key/value heads of this rank with r query heads each, d width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from parrot_sys.megatron.attention.context import AttentionContext
from parrot_sys.megatron.attention.core import CoreAttention
from parrot_sys.modules.rotary import turn
from parrot_sys.ops import few_rows_linear
from parrot_sys.ops.few_rows_linear import takes_few_rows
from parrot_sys.ops.paged_layer import LayerWeights, paged_layer


@dataclass(frozen=True, kw_only=True, slots=True)
class _Known:
    """Parts of a layer whose sums are worked out here; they are of no other class, and do nothing else."""

    attention: bool
    mlp: bool
    groups: int = 0  # g
    repeat: int = 0  # r
    normed: bool = False  # queries and keys
    whole: tuple[Any, ...] = ()  # modules of a layer that is one call, in the order of `_weights`
    eps: float = 0.0  # of their norms


class LeanLayer(TransformerLayer):
    """Megatron's layer; the rows of a step over a paged cache go the short way."""

    _known: _Known | None = None

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        context: Tensor | None = None,
        packed_seq_params: AttentionContext | None = None,
        **kwargs: Any,
    ) -> Any:
        """As Megatron's layer: [T, 1, H] -> ([T, 1, H], context)."""
        kwargs |= {"context": context, "packed_seq_params": packed_seq_params}
        if not self._goes_lean(packed_seq_params):
            return super().forward(hidden_states, *args, **kwargs)
        if self._is_one_call(packed_seq_params, hidden_states):
            assert packed_seq_params is not None, "a step over a paged cache has a context"
            return self._whole(hidden_states, packed_seq_params), context
        hidden, context = self._forward_attention(hidden_states, *args, **kwargs)
        return (self._lean_mlp(hidden) if self._parts.mlp else self._forward_mlp(hidden)), context

    def _forward_attention(
        self,
        hidden_states: Tensor,
        *args: Any,
        context: Tensor | None = None,
        packed_seq_params: AttentionContext | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if self._goes_lean(packed_seq_params) and self._parts.attention:
            assert packed_seq_params is not None, "a step over a paged cache has a context"
            return self._lean_attention(hidden_states, packed_seq_params), context
        kwargs |= {"context": context, "packed_seq_params": packed_seq_params}
        return super()._forward_attention(hidden_states, *args, **kwargs)  # type: ignore[no-any-return]

    def _goes_lean(self, context: AttentionContext | None) -> bool:
        # (Other programs of Megatron give such layers contexts of their own.)
        paged = getattr(context, "paged", None)
        return paged is not None and not self.training and not torch.is_grad_enabled()

    def _is_one_call(self, context: Any, hidden: Tensor) -> bool:
        # A step that reads whole prompts alone attends to their rows as they are; a router asks its attention.
        if not self._parts.whole or context.paged.fresh or context.router is not None or context.turns is None:
            return False
        # (Hooks may come at any time.)
        return takes_few_rows(hidden) and not any(
            own._forward_hooks or own._forward_pre_hooks for own in self._parts.whole if own is not None
        )

    def _whole(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        known, paged, core = self._parts, context.paged, self.self_attention.core_attention
        assert paged is not None, "the layer goes lean"
        assert context.turns is not None, "and has rotations"
        rows, weights = hidden.squeeze(1), _weights(known.whole)
        width = len(weights.w_qkv) // (known.groups * (known.repeat + 2))
        caches = paged.cache.buffers(core.layer_number, known.groups, width, rows.dtype)
        places, requests = (paged.blocks, paged.offsets), (paged.block_tables, context.cu_seqlens, paged.lengths)
        turns = context.turns
        out = paged_layer(rows, weights, turns, caches, places, requests, eps=known.eps, scale=core.scale)
        return out.unsqueeze(1)

    @property
    def _parts(self) -> _Known:
        if self._known is None:
            self._known = _known_parts(self)
        return self._known

    def _lean_attention(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        attention, known = self.self_attention, self._parts
        rows = hidden.squeeze(1)
        mixed = _normed_rows(self.input_layernorm, attention.linear_qkv, rows)
        heads = mixed.view(len(rows), known.groups, known.repeat + 2, -1)
        value = heads[:, :, -1]
        query, key = heads[:, :, :-2], heads[:, :, -2:-1]
        if known.normed:
            query, key = _normed(attention.q_layernorm, query), _normed(attention.k_layernorm, key)
        if context.turns is not None:
            both = heads[:, :, :-1] if not known.normed else torch.cat((query, key), dim=2)
            query, key = turn(both, *context.turns).split((known.repeat, 1), dim=2)
        query, key = query.flatten(1, 2), key.squeeze(2)
        read = attention.core_attention.packed(query, key, value, context).flatten(1)
        return _added(attention.linear_proj, read, rows).unsqueeze(1)

    def _lean_mlp(self, hidden: Tensor) -> Tensor:
        rows = hidden.squeeze(1)
        mixed = _normed_rows(self.pre_mlp_layernorm, self.mlp.linear_fc1, rows)
        return _added(self.mlp.linear_fc2, mixed, rows, gated=True).unsqueeze(1)


def run_layers(block: Any, hidden: Tensor | None, memory: Tensor | None, context: AttentionContext) -> Tensor:
    """Layers and last norm of a `TransformerBlock` for a step over a paged cache, without gradients.

    Args:
        block: of this pipeline stage.
        hidden: [T, 1, H] on the first stage; later ones have it from `set_input_tensor`.
        memory: what the layers get as `context`.
        context: of the step.
    """
    rows = hidden if block.pre_process else block.input_tensor
    assert rows is not None, "the first stage embeds, the others receive"
    for layer in block.layers:
        rows, memory = layer(rows, attention_mask=None, context=memory, packed_seq_params=context)
    return rows if block.final_layernorm is None else _normed(block.final_layernorm, rows)


def _known_parts(layer: LeanLayer) -> _Known:
    """Looks at the parts of a layer, once: neither their classes nor their settings change."""
    config, attention, mlp = layer.config, layer.self_attention, layer.mlp
    if _is_special(config):
        return _Known(attention=False, mlp=False)
    knows_mlp = (
        type(mlp) is MLP
        and config.gated_linear_unit
        and config.activation_func is F.silu
        and not config.use_te_activation_func
        and getattr(config, "activation_func_clamp_value", None) is None
        and not getattr(config, "glu_linear_offset", 0.0)
    )
    if (
        type(attention) is not SelfAttention
        or type(attention.core_attention) is not CoreAttention
        or not isinstance(layer.cross_attention, IdentityOp)
        or getattr(config, "attention_output_gate", False)
        or attention.world_size > config.num_query_groups
    ):
        return _Known(attention=False, mlp=knows_mlp)
    groups = attention.num_query_groups_per_partition
    repeat = attention.num_attention_heads_per_partition // groups
    normed = any(not isinstance(norm, IdentityOp | None) for norm in (attention.q_layernorm, attention.k_layernorm))
    whole, eps = _one_call(layer) if knows_mlp else ((), 0.0)
    return _Known(attention=True, mlp=knows_mlp, groups=groups, repeat=repeat, normed=normed, whole=whole, eps=eps)


def _one_call(layer: LeanLayer) -> tuple[tuple[Any, ...], float]:
    """Modules whose work `paged_layer` does, and the eps of their norms; none if it does not know them all."""
    attention, mlp = layer.self_attention, layer.mlp
    heads = [None if isinstance(own, IdentityOp) else own for own in (attention.q_layernorm, attention.k_layernorm)]
    norms: list[Any] = [layer.input_layernorm, layer.pre_mlp_layernorm, *heads]
    columns, rows = (attention.linear_qkv, mlp.linear_fc1), (attention.linear_proj, mlp.linear_fc2)
    epsilons: set[Any] = {own.eps for own in norms if type(own) is nn.RMSNorm}
    if (
        type(layer)._forward_attention is not LeanLayer._forward_attention
        or not all(own is None or type(own) is nn.RMSNorm for own in norms)
        or None in (*norms[:2], *epsilons)
        or len(epsilons) != 1
        or not all(type(own) is ColumnParallelLinear and not own.gather_output for own in columns)
        or not all(type(own) is RowParallelLinear and own.tp_group.size() == 1 and own.bias is None for own in rows)
        or mlp.linear_fc1.bias is not None
    ):
        return (), 0.0
    first, second, q_norm, k_norm = norms
    return (first, columns[0], q_norm, k_norm, rows[0], second, columns[1], rows[1]), epsilons.pop()


def _weights(modules: tuple[Any, ...]) -> LayerWeights:
    first, qkv, q_norm, k_norm, out, second, gate_up, down = modules
    return LayerWeights(
        norm_1=first.weight,
        w_qkv=qkv.weight,
        b_qkv=qkv.bias,
        q_norm=None if q_norm is None else q_norm.weight,
        k_norm=None if k_norm is None else k_norm.weight,
        w_out=out.weight,
        norm_2=second.weight,
        w_gate_up=gate_up.weight,
        w_down=down.weight,
    )


def _is_special(config: TransformerConfig) -> bool:
    """Whether layers do something between their parts that is not known here."""
    names = ("sequence_parallel", "fp32_residual_connection", "fp8", "fp4", "inference_fuse_tp_communication")
    return config.context_parallel_size > 1 or any(getattr(config, name, None) for name in names)


def _is(module: Any, kind: type[nn.Module]) -> bool:
    return type(module) is kind and not (module._forward_hooks or module._forward_pre_hooks)


def _normed(norm: Any, rows: Tensor) -> Tensor:
    if norm is None:
        return rows
    if _is(norm, nn.RMSNorm):
        return F.rms_norm(rows, norm.normalized_shape, norm.weight, norm.eps)
    normed: Tensor = norm(rows)
    return normed


def _normed_rows(norm: Any, linear: Any, rows: Tensor) -> Tensor:
    """This rank's part of a column-parallel layer's output for rows that are to be normed, with its bias."""
    known = _is(linear, ColumnParallelLinear) and not linear.gather_output
    if known and takes_few_rows(rows) and _is(norm, nn.RMSNorm) and norm.eps is not None:
        return few_rows_linear(rows, linear.weight, norm=norm.weight, bias=linear.bias, eps=norm.eps)
    rows = _normed(norm, rows)
    if known:
        return F.linear(rows, linear.weight, linear.bias)
    output, bias = linear(rows.unsqueeze(1))
    return (output if bias is None else output + bias).squeeze(1)


def _added(linear: Any, rows: Tensor, residual: Tensor, *, gated: bool = False) -> Tensor:
    """Residual and output of a row-parallel layer; with `gated` of silu(gate) * up for the halves of the rows."""
    known = _is(linear, RowParallelLinear) and linear.tp_group.size() == 1 and linear.bias is None
    if known and takes_few_rows(rows):
        return few_rows_linear(rows, linear.weight, residual=residual, gated=gated)
    if gated:
        gate, up = rows.chunk(2, dim=-1)
        rows = F.silu(gate).mul_(up)
    if known:
        return torch.addmm(residual, rows, linear.weight.t())
    output, bias = linear(rows.unsqueeze(1))
    output = output.squeeze(1)
    return residual + (output if bias is None else output + bias)
