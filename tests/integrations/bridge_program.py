"""Megatron-Bridge with our router and experts: a Hugging Face model in and out. Arguments: the folder, EP, ETP, PP.

Transformer Engine, which Megatron-Bridge imports, is a stub; Megatron-Core does not see it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import gpt_layer_specs  # before the stub

import parrot_sys.megatron
from parrot_sys.megatron.runtime import cpu_layer
from parrot_sys.megatron.runtime.initialize import ParallelConfig, initialize
from tests.megatron import te_stub

cpu_layer.widen()  # Megatron-Bridge asks for GPUs as well
te_stub.install()
te_stub.newer_typing()

from megatron.bridge import AutoBridge  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM  # noqa: E402

from parrot_sys.integrations.megatron_bridge.experts import register  # noqa: E402

OFF = (
    "moe_permute_fusion",
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "apply_rope_fusion",
    "moe_grouped_gemm",
    "persist_layer_norm",
)
"""What needs a GPU."""


def hugging_face_model(folder: Path) -> Any:
    """A tiny Qwen3-MoE, saved in `folder`."""
    config = Qwen3MoeConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config).float()
    if torch.distributed.get_rank() == 0:
        model.save_pretrained(folder)
    torch.distributed.barrier()
    return model


def adapt_to_cpu(provider: Any) -> None:
    """Switches off what needs a GPU."""
    provider.bf16, provider.use_cpu_initialization = False, True
    provider.params_dtype = provider.pipeline_dtype = provider.autocast_dtype = torch.float32
    for name in OFF:
        setattr(provider, name, False)


def megatron_model(bridge: Any, parallel: ParallelConfig) -> Any:
    """This rank's part, with our router and experts and the weights of Hugging Face."""
    provider = bridge.to_megatron_provider(load_weights=False)
    spec = gpt_layer_specs.get_gpt_layer_local_spec(num_experts=4, normalization="RMSNorm", qk_layernorm=True)
    spec = parrot_sys.megatron.with_grouped_experts(spec)
    if parallel.tensor_model_parallel_size > 1:
        spec = parrot_sys.megatron.with_norms(spec, 2 // parallel.pipeline_model_parallel_size)
    provider.transformer_layer_spec = lambda _: spec  # (of a stage's layers it takes only what makes it)
    adapt_to_cpu(provider)
    for name in ("tensor", "pipeline", "expert"):
        setattr(provider, f"{name}_model_parallel_size", getattr(parallel, f"{name}_model_parallel_size"))
    provider.expert_tensor_parallel_size = parallel.expert_tensor_size
    provider.sequence_parallel = parallel.sequence_parallel
    provider.finalize()
    if getattr(provider, "_pg_collection", None) is None:
        provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    groups = provider._pg_collection
    model = provider.provide(groups.pp.rank() == 0, groups.pp.rank() == groups.pp.size() - 1)
    bridge.load_hf_weights([model])
    return model


def main() -> None:
    """Loads, compares logits where one process has the model, and exports."""
    folder = Path(sys.argv[1])
    experts, expert_tensor, stages = map(int, sys.argv[2:])
    parallel = ParallelConfig(
        expert_model_parallel_size=experts,
        tensor_model_parallel_size=expert_tensor,
        sequence_parallel=expert_tensor > 1,
        pipeline_model_parallel_size=stages,
    )
    initialize(parallel)
    register()
    reference = hugging_face_model(folder)
    bridge = AutoBridge.from_hf_pretrained(str(folder), torch_dtype=torch.float32)
    model = megatron_model(bridge, parallel)
    error = 0.0
    if stages == 1:
        ids, positions = torch.randint(0, 128, (2, 12)), torch.arange(12).expand(2, 12)
        mask = torch.ones(12, 12, dtype=torch.bool).triu(1)[None, None]
        with torch.no_grad():
            logits = gather_from_tensor_model_parallel_region(model(ids, positions, mask))
            error = float((logits[..., :128] - reference(ids).logits).abs().max())
    exported = dict(bridge.export_hf_weights([model], cpu=True, show_progress=False))
    saved = load_file(folder / "model.safetensors")
    equal = sum(name in exported and torch.equal(exported[name], tensor) for name, tensor in saved.items())
    if torch.distributed.get_rank() == 0:
        print(f"logits {error:.1e}, {equal} of {len(saved)} tensors bit-equal, {len(exported)} exported", flush=True)


if __name__ == "__main__":
    main()
