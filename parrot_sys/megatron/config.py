"""The one translation from our configurations to Megatron-Core's `TransformerConfig`: all fields we set are here."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from parrot_sys.errors import ConfigError
from parrot_sys.megatron.runtime.initialize import ParallelConfig
from parrot_sys.models.llm import LLMConfig, TokenExpertsConfig
from parrot_sys.parallel import check_experts

Recompute = Literal["none", "full"]


def common_fields(parallel: ParallelConfig, dtype: torch.dtype, *, initialize_weights: bool) -> dict[str, Any]:
    """The fields that hold for any transformer of ours: layout, precision, initialisation and what is switched off.

    Expert parallelism is not among them (`token_expert_fields`): Megatron would ask how many experts there are.

    Weights are initialised on the host, so that they do not depend on the layout; kernels that need apex or Transformer
    Engine are off (we bring norm and attention by ModuleSpec).
    """
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        # Packed micro-batches differ in their number of rows.
        "variable_seq_lengths": parallel.pipeline_model_parallel_size > 1,
        # Megatron checks that it takes micro-batches of different lengths, also where there are no experts.
        "moe_token_dispatcher_type": "alltoall",
        # Batched point-to-point calls give wrong gradients in the interleaved schedule on gloo.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu_initialization": True,
        "perform_initialization": initialize_weights,
        "attention_backend": AttnBackend.auto,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "apply_rope_fusion": False,
    }


def recompute_fields(recompute: Recompute, num_layers: int = 1) -> dict[str, Any]:
    """`full`: keep only the input of every `num_layers` layers and compute the rest again in the backward pass."""
    if recompute == "none":
        return {}
    if recompute != "full":
        raise ConfigError(f"recompute must be 'none' or 'full', got {recompute!r}")
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": num_layers}


def token_expert_fields(experts: TokenExpertsConfig | None, parallel: ParallelConfig) -> dict[str, Any]:
    """The fields of experts in the decoder's layers.

    Raises:
        ConfigError: the experts cannot be shared as `parallel` asks.
    """
    if experts is None:
        return {}
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_size
    check_experts(experts.num_experts, experts.ffn_hidden_size, ep, etp, section="llm.experts")
    return {
        "num_moe_experts": experts.num_experts,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_router_topk": experts.topk,
        "moe_router_pre_softmax": not experts.renormalize,
        "moe_router_load_balancing_type": "none",
        # Near ties should not be decided by the rounding of half precision.
        "moe_router_dtype": "fp32",
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": etp,
    }


def to_transformer_config(
    llm: LLMConfig,
    parallel: ParallelConfig,
    *,
    dtype: torch.dtype = torch.float32,
    recompute: Recompute = "none",
    initialize_weights: bool = True,
) -> TransformerConfig:
    """Configuration of the decoder (`parrot_sys.models.llm`).

    Args:
        llm: sizes and constants of the decoder.
        parallel: layout.
        dtype: of parameters and activations.
        recompute: see `recompute_fields`.
        initialize_weights: False leaves the weights uninitialised (they are loaded afterwards, or the device is meta).

    Raises:
        ConfigError: if the decoder cannot be cut as `parallel` asks.
    """
    parallel.check_tensor_sizes("llm", llm.tensor_sizes())
    return TransformerConfig(
        **common_fields(parallel, dtype, initialize_weights=initialize_weights),
        **recompute_fields(recompute),
        **token_expert_fields(llm.experts, parallel),
        pipeline_model_parallel_layout=_stage_layout(llm.num_layers, parallel),
        num_layers=llm.num_layers,
        hidden_size=llm.hidden_size,
        num_attention_heads=llm.num_attention_heads,
        num_query_groups=llm.num_query_groups,
        kv_channels=llm.kv_channels,
        ffn_hidden_size=llm.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=llm.norm_eps,
        add_qkv_bias=llm.qkv_bias,
        qk_layernorm=llm.qk_norm,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        init_method_std=0.02,
    )


def _stage_layout(num_layers: int, parallel: ParallelConfig) -> list[list[str]] | None:
    """Layers of each pipeline stage, in Megatron's words; None without a pipeline."""
    stages = [["decoder"] * count for count in parallel.layers_of_stages(num_layers)]
    if len(stages) == 1:
        return None
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages
