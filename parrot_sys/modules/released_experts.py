"""Tensors of TextGuidedMoE as released checkpoints name and shape them; values are only moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from parrot_sys.errors import CheckpointError

_BIAS_KEY = "gate.e_score_correction_bias"  # as DeepSeek-V3 names it


def is_expert_bias(key: str) -> bool:
    """Whether a tensor's name is that of the experts' bias."""
    return key.endswith(_BIAS_KEY)


def released_keys(num_experts: int, *, expert_bias: bool = False) -> dict[str, tuple[str, ...]]:
    """For each tensor of TextGuidedMoE the released tensors it is made of, in the order `pack_released` wants.

    Released names are relative to `model.moe_model.`: `gate.weight` [E, H], `experts.N.gate_proj.weight` and `up_proj`
    [I, H], `experts.N.down_proj.weight` [H, I]; and with `expert_bias` what no released checkpoint has,
    `gate.e_score_correction_bias` [E].
    """
    experts = [f"experts.{e}" for e in range(num_experts)]
    return {
        **({"selection_bias": (_BIAS_KEY,)} if expert_bias else {}),
        "router_weight": ("gate.weight",),
        "w_gate_up": tuple(f"{e}.{part}_proj.weight" for e in experts for part in ("gate", "up")),
        "w_down": tuple(f"{e}.down_proj.weight" for e in experts),
    }


def pack_released(name: str, tensors: Sequence[Tensor]) -> Tensor:
    """One parameter of TextGuidedMoE from its released tensors (order of `released_keys`); values are only moved."""
    if name in ("router_weight", "selection_bias"):
        return tensors[0]
    if name == "w_gate_up":
        return torch.stack(list(tensors)).unflatten(0, (-1, 2))
    return torch.stack([tensor.T for tensor in tensors])


def unpack_released(name: str, tensor: Tensor) -> list[Tensor]:
    """The reverse of `pack_released`; contiguous tensors in the order of `released_keys`."""
    if name in ("router_weight", "selection_bias"):
        return [tensor]
    if name == "w_gate_up":
        return list(tensor.flatten(0, 1).unbind())
    return [expert.T.contiguous() for expert in tensor]


def experts_from_released(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of TextGuidedMoE from the released tensors (names relative to `model.moe_model.`), bit-equal.

    Raises:
        CheckpointError: lists the missing and the unexpected names.
    """
    num_experts = sum(key.endswith(".down_proj.weight") for key in tensors)
    keys = released_keys(num_experts, expert_bias=any(map(is_expert_bias, tensors)))
    wanted = {key for names in keys.values() for key in names}
    if wanted != tensors.keys():
        missing, unexpected = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
        raise CheckpointError(f"released MoE tensors do not fit: missing {missing}, unexpected {unexpected}")
    return {name: pack_released(name, [tensors[key] for key in names]) for name, names in keys.items()}


def experts_to_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `experts_from_released`."""
    keys = released_keys(state["router_weight"].shape[0], expert_bias="selection_bias" in state)
    return {
        key: part
        for name, names in keys.items()
        for key, part in zip(names, unpack_released(name, state[name]), strict=True)
    }
