"""Projector and experts over Megatron's process groups: who shares what, its marks on parameters, its checkpoints."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn
from torch.distributed import ProcessGroup

from parrot_sys.megatron.embed.moe_layer import GroupedExperts
from parrot_sys.modules.projector import Projector
from parrot_sys.modules.text_guided_moe import TextGuidedMoE
from parrot_sys.parallel import ExpertGroups

_EXPERT_COLUMNS = {"w_gate_up": 2, "w_down": 1}
"""Parameters that hold experts -> the dimension of their inner columns; dimension 0 counts the experts."""


def multi_rank_group(group: ProcessGroup) -> ProcessGroup | None:
    """The group, or None where it has one rank."""
    return group if group.size() > 1 else None


def expert_groups(groups: ProcessGroupCollection) -> ExpertGroups:
    """Megatron's groups as the modules take them."""
    return ExpertGroups(
        tp=multi_rank_group(groups.tp),
        ep=multi_rank_group(groups.ep),
        etp=multi_rank_group(groups.expt_tp),
        joint=multi_rank_group(groups.tp_ep),
    )


def mark_projector(projector: Projector) -> None:
    """Tells Megatron which parameters each tensor-parallel rank holds a part of (they count in full in norms)."""
    for name, dim in projector.cut_dims().items():
        _mark_cut(projector.get_parameter(name), dim)


def _are_apart(groups: ProcessGroupCollection) -> bool:
    """Whether the ranks that hold copies of the same experts are others than those with copies of dense parameters."""
    copies, dense_copies = (set(dist.get_process_group_ranks(group)) for group in (groups.expt_dp, groups.dp_cp))
    return copies != dense_copies


def mark_experts(moe: TextGuidedMoE, groups: ProcessGroupCollection) -> None:
    """Tells Megatron to sum the experts' gradients over the ranks that hold copies of the same experts.

    They get gradient buffers and an optimizer of their own by that. Where these ranks are those that hold copies of the
    dense parameters, the experts stay with them: fewer messages.
    """
    apart = _are_apart(groups)
    for name, dim in _EXPERT_COLUMNS.items():
        parameter: Any = moe.get_parameter(name)
        if apart:
            parameter.allreduce = False
        if apart or moe.groups.etp is not None:
            _mark_cut(parameter, dim)  # no rank's part counts twice in the norm of the gradients


def mark_token_experts(decoder: nn.Module, groups: ProcessGroupCollection) -> None:
    """The same for the experts inside the decoder's layers, which mark themselves wherever `ep` has several ranks.

    Copies on tensor-parallel ranks (`expt_tp` smaller than `tp`) see other rows under sequence parallelism.
    """
    if not _are_apart(groups):
        return
    for module in decoder.modules():
        if isinstance(module, GroupedExperts):
            for parameter in module.parameters():
                vars(parameter)["allreduce"] = False


def _mark_cut(parameter: Any, dim: int) -> None:
    parameter.tensor_model_parallel = True
    parameter.partition_dim = dim
    parameter.partition_stride = 1


def sharded_projector(projector: Projector, prefix: str, groups: ProcessGroupCollection) -> dict[str, ShardedTensor]:
    """Parts of the parameters that are cut over tensor-parallel ranks, for distributed checkpoints."""
    copy = (0, 0, groups.dp_cp.rank())
    return {
        prefix + name: ShardedTensor.from_rank_offsets(
            prefix + name,
            projector.get_parameter(name),
            (dim, groups.tp.rank(), groups.tp.size()),
            replica_id=copy,
        )
        for name, dim in projector.cut_dims().items()
    }


def sharded_experts(moe: TextGuidedMoE, prefix: str, groups: ProcessGroupCollection) -> dict[str, ShardedTensor]:
    """This rank's experts and columns, for distributed checkpoints."""
    copy = (0, 0, groups.expt_dp.rank())
    return {
        prefix + name: ShardedTensor.from_rank_offsets(
            prefix + name,
            moe.get_parameter(name),
            (0, moe.groups.ep_rank, moe.groups.ep_size),
            (dim, moe.groups.etp_rank, moe.groups.etp_size),
            replica_id=copy,
        )
        for name, dim in _EXPERT_COLUMNS.items()
    }
