"""Megatron's TEGroupedMLP saves its weights and our experts load them; in a process of its own. Argument: a folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.megatron import te_stub

te_stub.install()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import parrot_sys.megatron  # noqa: E402
from parrot_sys.megatron.runtime.initialize import ParallelConfig, initialize  # noqa: E402
from parrot_sys.testing.distributed import run_distributed  # noqa: E402

EXPERTS, HIDDEN, INNER = 4, 8, 12
PREFIX = "decoder.layers.0.mlp.experts."


def make_config(parallel: ParallelConfig) -> Any:
    """A configuration that both kinds of experts take."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        num_moe_experts=EXPERTS,
        moe_ffn_hidden_size=INNER,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        use_cpu_initialization=True,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_size,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
    )


def value(expert: int, layer: str) -> torch.Tensor:
    """The whole weight of an expert, different in every element."""
    shape = (2 * INNER, HIDDEN) if layer == "linear_fc1" else (HIDDEN, INNER)
    start = 1000 * expert + (500 if layer == "linear_fc2" else 0)
    return torch.arange(start, start + shape[0] * shape[1]).float().view(shape)


def metadata(groups: Any, apart: bool) -> dict[str, Any]:
    """As Megatron's training hands it down."""
    return {"singleton_local_shards": apart, "dp_cp_group": groups.dp_cp}


def save(rank: int, size: int, parallel: ParallelConfig, folder: Path, apart: bool) -> None:
    """Saves the peer's experts."""
    from megatron.core import dist_checkpointing
    from megatron.core.extensions.transformer_engine import TEColumnParallelGroupedLinear, TERowParallelGroupedLinear
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import TEGroupedMLP

    initialize(parallel)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    parts = MLPSubmodules(linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear)
    local = EXPERTS // parallel.expert_model_parallel_size
    experts = TEGroupedMLP(local, make_config(parallel), parts, groups)
    ranks, place = groups.expt_tp.size(), groups.expt_tp.rank()
    with torch.no_grad():
        for index in range(local):
            number = groups.ep.rank() * local + index
            halves = value(number, "linear_fc1").view(2, INNER, HIDDEN).chunk(ranks, 1)[place]
            getattr(experts.linear_fc1, f"weight{index}").copy_(halves.flatten(0, 1))
            getattr(experts.linear_fc2, f"weight{index}").copy_(value(number, "linear_fc2").chunk(ranks, 1)[place])
    state = experts.sharded_state_dict(PREFIX, (), metadata(groups, apart))
    dist_checkpointing.save(state, str(folder))


def load(rank: int, size: int, parallel: ParallelConfig, folder: Path, apart: bool) -> None:
    """Loads them into ours, on another layout."""
    from megatron.core import dist_checkpointing
    from megatron.core.process_groups_config import ProcessGroupCollection

    initialize(parallel)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    local = EXPERTS // parallel.expert_model_parallel_size
    experts = parrot_sys.megatron.GroupedExperts(local, make_config(parallel), pg_collection=groups)
    state = experts.sharded_state_dict(PREFIX, (), metadata(groups, apart))
    loaded = dist_checkpointing.load(state, str(folder))
    for index in range(local):
        number = groups.ep.rank() * local + index
        assert torch.equal(loaded[f"{PREFIX}w_gate_up"][index].flatten(0, 1), value(number, "linear_fc1"))
        assert torch.equal(loaded[f"{PREFIX}w_down"][index], value(number, "linear_fc2"))


def main() -> None:
    """Each kind of keys; the peer has two expert parallel ranks, ours are on one process and on two."""
    parallel = ParallelConfig(expert_model_parallel_size=2)
    for apart in (False, True):
        folder = Path(sys.argv[1]) / str(apart)
        folder.mkdir()
        run_distributed(save, 2, parallel, folder, apart)
        run_distributed(load, 1, ParallelConfig(), folder, apart)
        run_distributed(load, 2, parallel, folder, apart)
        print("loaded", apart, flush=True)


if __name__ == "__main__":
    main()
