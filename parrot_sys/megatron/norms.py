"""Norms by ModuleSpec that work without Transformer Engine and with sequence parallelism (Megatron's torch norms refuse it)."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


class Norm:
    """Builds the `torch.nn.RMSNorm` or `LayerNorm` that `config.normalization` names.

    Under sequence parallelism each rank sees a part of the rows, so the gradients of the parameters are partial sums:
    `parameter.sequence_parallel` makes Megatron add them up over the tensor-parallel group.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> nn.Module:
        build = {"RMSNorm": nn.RMSNorm, "LayerNorm": nn.LayerNorm}[config.normalization]
        norm = build(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
