"""Norms by ModuleSpec that work without Transformer Engine under sequence parallelism, which Megatron's refuse."""

from __future__ import annotations

import copy
from typing import Any

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from parrot_sys.megatron.runtime import backends

_INSIDE_ATTENTION = ("q_layernorm", "k_layernorm", "kv_layernorm")
_WITHOUT_WEIGHTS = (None, IdentityOp, L2Norm)


class Norm:
    """Builds the RMSNorm or LayerNorm that `config.normalization` names: an accelerated one (`backends`) or torch's.

    Under sequence parallelism each rank sees a part of the rows, so the gradients of the parameters are partial sums:
    `parameter.sequence_parallel` makes Megatron add them up over the tensor-parallel group.
    """

    def __new__(  # type: ignore[misc] # a class, because Megatron takes functions in specs for finished modules
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> nn.Module:
        """
        Args:
            config: gives kind, dtype and sequence parallelism.
            hidden_size: width of the rows.
            eps: added to the mean square or the variance.
        """
        if fused := backends.fused_norm(config.normalization):
            return fused(config=config, hidden_size=hidden_size, eps=eps)
        build = {"RMSNorm": nn.RMSNorm, "LayerNorm": nn.LayerNorm}[config.normalization]
        norm = build(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


def with_norms(layer_spec: ModuleSpec | TransformerBlockSubmodules, num_layers: int) -> TransformerBlockSubmodules:
    """A copy of a model's layer spec with `Norm` before attention and MLP and after the last layer.

    The norms of queries and keys become `Norm` too, where the spec has some with weights (`qk_layernorm`). Megatron's
    own norms refuse sequence parallelism where neither Transformer Engine nor apex is installed.

    Args:
        layer_spec: of one layer, or of each.
        num_layers: layers of this pipeline stage (`get_num_layers_to_build`), for the spec of one layer.
    """
    changed = copy.deepcopy(layer_spec)
    if isinstance(changed, ModuleSpec):
        changed = TransformerBlockSubmodules(layer_specs=[changed] * num_layers)
    for layer in changed.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
        attention = layer.submodules.self_attention.submodules
        for name in _INSIDE_ATTENTION:
            if getattr(attention, name, None) not in _WITHOUT_WEIGHTS:
                setattr(attention, name, Norm)
    changed.layer_norm = Norm
    return changed
