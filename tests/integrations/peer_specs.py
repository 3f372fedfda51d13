"""For `--spec`: Megatron's own router and experts with the norms of `parrot_sys`, to compare ours with."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec

from parrot_sys.megatron import specs, with_norms

if (_layers := specs._layers_of_this_stage()) is not None:
    layer_norms = with_norms(get_gpt_layer_local_spec(num_experts=1, normalization="RMSNorm"), _layers)
    """Up to release 0.18."""


def gpt_moe_norms(config: Any, vp_stage: int | None = None) -> Any:
    """From release 0.19 on."""
    transformer = config.transformer
    block = get_gpt_decoder_block_spec(
        transformer, use_transformer_engine=False, normalization=transformer.normalization, vp_stage=vp_stage
    )
    return with_norms(block, 0)
