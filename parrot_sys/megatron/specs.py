"""Layer specs for the option `--spec` of Megatron-LM's programs: `--spec parrot_sys.megatron.specs NAME`.

| Megatron-LM | takes | names |
|---|---|---|
| 0.16 to 0.18 | an object | `layer`, `layer_norms` (inside a program) |
| from 0.19 | a function of the model's configuration | `gpt_moe`, `gpt_moe_norms` |

Each has our router and experts in every MoE layer; those with `norms` also have norms that run without Transformer
Engine and apex, as tensor and sequence parallelism on the CPU need.
"""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.transformer_block import get_num_layers_to_build

from parrot_sys.errors import ConfigError
from parrot_sys.megatron import with_grouped_experts, with_norms


def _arguments() -> Any:
    """Arguments of the running program of Megatron-LM, where it has process groups; None without one.

    From release 0.19 on a program reads specs before it has process groups, and calls functions of them later.
    """
    if not parallel_state.model_parallel_is_initialized():
        return None
    try:
        from megatron.training import get_args

        return get_args()
    except (ImportError, AssertionError):
        return None


def layer_spec(arguments: Any) -> Any:
    """Spec of a layer with our router and experts, otherwise as the program itself would build it.

    Args:
        arguments: the program's; None for a plain layer.

    Raises:
        ConfigError: they ask for layers that differ from each other, which one spec cannot say.
    """
    if arguments is None:
        return with_grouped_experts(get_gpt_layer_local_spec(num_experts=1, normalization="RMSNorm"))
    frequency = arguments.moe_layer_freq
    if frequency != 1 and not (isinstance(frequency, list) and all(frequency)):
        raise ConfigError(f"--moe-layer-freq with this --spec must be 1: all layers have experts, got {frequency}")
    for name in ("experimental_attention_variant", "heterogeneous_layers_config_path"):
        if (value := getattr(arguments, name, None)) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} {value} with this --spec: leave one of the two out")
    held = {
        "num_experts": 1,
        "qk_layernorm": arguments.qk_layernorm,
        "multi_latent_attention": arguments.multi_latent_attention,
        "qk_l2_norm": getattr(arguments, "qk_l2_norm", False),
    }
    if arguments.transformer_impl == "transformer_engine":
        return with_grouped_experts(get_gpt_layer_with_transformer_engine_spec(**held))
    return with_grouped_experts(get_gpt_layer_local_spec(**held, normalization=arguments.normalization))


def _layers_of_this_stage(arguments: Any) -> int:
    from megatron.training.arguments import core_transformer_config_from_args

    # (Under the interleaved schedule all chunks have as many, unless --account-for-... takes some from the ends.)
    chunk = None if arguments.virtual_pipeline_model_parallel_size is None else 0
    layers: int = get_num_layers_to_build(core_transformer_config_from_args(arguments), vp_stage=chunk)
    return layers


layer = layer_spec(_arguments())
"""Spec of a layer, with our router and experts."""
if _arguments() is not None:
    layer_norms = with_norms(layer, _layers_of_this_stage(_arguments()))
    """Specs of a stage's layers, with norms that need neither Transformer Engine nor apex as well."""


def gpt_moe(config: Any, vp_stage: int | None = None) -> Any:
    """Specs of a model's layers, with our router and experts.

    Args:
        config: the model's, whose `transformer` is a TransformerConfig.
        vp_stage: chunk number under the interleaved pipeline schedule.
    """
    transformer = config.transformer
    block = get_gpt_decoder_block_spec(
        transformer,
        use_transformer_engine=transformer.transformer_impl == "transformer_engine",
        normalization=transformer.normalization,
        qk_l2_norm=transformer.qk_l2_norm,
        vp_stage=vp_stage,
    )
    return with_grouped_experts(block)


def gpt_moe_norms(config: Any, vp_stage: int | None = None) -> Any:
    """The same with norms that need neither Transformer Engine nor apex."""
    return with_norms(gpt_moe(config, vp_stage), 0)
