"""Inputs of layers with the learners of Wings in other people's Megatron models: memory, plan and attention context."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from parrot_sys.errors import ConfigError, DataError
from parrot_sys.megatron.attention.context import make_context
from parrot_sys.megatron.embed.learner_layers import whole_rows
from parrot_sys.megatron.embed.learner_memory import check_length, gather_memory, papers_plan
from parrot_sys.modules.learners import LearnersConfig


def learner_inputs(
    decoder_input: Tensor,
    is_visual: Tensor,
    settings: LearnersConfig,
    config: TransformerConfig,
    *,
    cu_seqlens: Tensor | None = None,
    routed: bool = True,
    weights: dict[int, Tensor] | None = None,
    tp_group: ProcessGroup | None = None,
) -> dict[str, Any]:
    """Arguments for the forward pass of a `GPTModel` whose layers have learners (`with_learners`).

    The memory is the input of the first layer: projected image rows and word embeddings. Each row reads what its sample
    has up to itself (the paper's rule, arXiv 2406.03496). Looks at `is_visual` on the host once.

    Args:
        decoder_input: [s, b, H], images in place, as the layers get it: under sequence parallelism this rank's part.
        is_visual: bool [b, s], rows that come from an image; all of them, on every tensor-parallel rank.
        settings: of the learners.
        config: of the model.
        cu_seqlens: int32 [S + 1], where the samples of a pack begin and end (b = 1); None: each batch entry is one.
        routed: False for Wings' first stage: visual learners alone, added as they are.
        weights: filled with the router's weights, number of the layer -> [T, 2], when it is a dictionary.
        tp_group: tensor-parallel ranks; Megatron's own when not given.

    Returns:
        `decoder_input`, `packed_seq_params` and `extra_block_kwargs`: `model(ids, positions, None, **inputs)`.

    Raises:
        ConfigError: pipeline or context parallelism, or the released rule.
        DataError: shapes that do not fit, or samples longer than the router's positions.
    """
    _check_settings(settings, config)
    batch, length = is_visual.shape
    group = parallel_state.get_tensor_model_parallel_group() if tp_group is None else tp_group
    rows = whole_rows(decoder_input, group, sequence_parallel=config.sequence_parallel)
    if len(rows) != is_visual.numel() or decoder_input.shape[1] != batch:
        raise DataError(
            f"is_visual must be [b, s] for a decoder_input [s, b, H], got {list(is_visual.shape)} for "
            f"{list(decoder_input.shape)} on each of {group.size()} tensor-parallel ranks"
        )
    bounds = _bounds(cu_seqlens, batch, length, rows.device)
    lengths = bounds.diff()
    longest = int(lengths.max())
    check_length(settings, longest)
    places = torch.arange(len(rows), device=rows.device)
    positions = places - bounds[:-1].long().repeat_interleave(lengths, output_size=len(rows))
    visual_rows = is_visual.to(rows.device).flatten().nonzero()[:, 0]
    plan = papers_plan(bounds, visual_rows, positions, settings, width=rows.shape[1], routed=routed, weights=weights)
    context = make_context(bounds, longest, dtype=config.params_dtype, memory=plan, positions=positions)
    context.max_seqlen_q = context.max_seqlen_kv = length  # for Megatron's rotary embedding
    memory = gather_memory(rows, plan, None)
    return {
        "decoder_input": decoder_input,
        "packed_seq_params": context,
        "extra_block_kwargs": {"context": memory},
    }


def _check_settings(settings: LearnersConfig, config: TransformerConfig) -> None:
    """
    Raises:
        ConfigError: pipeline or context parallelism, or the released rule.
    """
    for name in ("pipeline_model_parallel_size", "context_parallel_size"):
        if (size := getattr(config, name)) > 1:
            raise ConfigError(
                f"the memory of the learners reaches the layers of one stage only: {name} must be 1, got {size} "
                "(the decoder of parrot_sys sends it on)"
            )
    if settings.rule != "paper":
        raise ConfigError(f'learners in a model of your own follow settings.rule "paper", got {settings.rule!r}')


def _bounds(cu_seqlens: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """int32 [S + 1], bounds of the samples among all rows."""
    if cu_seqlens is None:
        return torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)
    if batch > 1 or int(cu_seqlens[-1]) != length:
        raise DataError(
            f"cu_seqlens must end at the {length} rows of one pack (b = 1), got {int(cu_seqlens[-1])} and b = {batch}"
        )
    return cu_seqlens.to(device)
