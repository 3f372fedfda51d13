"""Megatron-Bridge reads and writes models whose MoE layers have our router and experts, after one call.

    from megatron.bridge import AutoBridge
    from parrot_sys.integrations.megatron_bridge.experts import register

    register()
    bridge = AutoBridge.from_hf_pretrained("Qwen/Qwen3-30B-A3B")
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.transformer_layer_spec = ...  # through parrot_sys.megatron.with_grouped_experts

`register` derives our mappings from those that a bridge has for Megatron's own experts, so that it serves every bridge
whose checkpoint has one tensor for each expert and projection. The layout is that of the model (docs/integrations.md
says which were tried).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import AutoMapping, MegatronParamMapping
from torch import Tensor, nn

from parrot_sys.errors import ConfigError

# E experts, N of them on this rank, I inner width of an expert, P of it on this rank, H hidden size

_GROUPED = ".experts.linear_fc{}.weight*"
"""Megatron's own grouped experts in the patterns of a bridge."""
_SHARED_AXIS = 2
"""Of both our weights, cut over the expert tensor parallel ranks."""


class StackedExpertsMapping(MegatronParamMapping):
    """`w_gate_up` [N, 2, P, H] or `w_down` [N, H, P] of `GroupedExperts` <-> a tensor for each expert and projection.

    The keys of `hf_param` are `EXPERT.gate`, `EXPERT.up` and `EXPERT.down`.
    """

    is_expert = True
    """So that `tp_group` is that of expert tensor parallelism."""

    def _validate_patterns(self) -> None:
        """The other side has more names than wildcards here, which the usual check refuses."""

    @property
    def _projections(self) -> tuple[str, ...]:
        return ("down",) if "0.down" in self.hf_param else ("gate", "up")

    def hf_to_megatron(self, hf_weights: dict[str, Tensor], megatron_module: nn.Module) -> Tensor:
        """This rank's part of the weight."""
        count = len(hf_weights) // len(self._projections) // self.ep_size
        experts = range(self.ep_rank * count, (self.ep_rank + 1) * count)
        if self._projections == ("down",):
            return torch.stack([self._part(hf_weights[f"{expert}.down"], 1) for expert in experts])
        return torch.stack(
            [torch.stack([self._part(hf_weights[f"{e}.{name}"], 0) for name in self._projections]) for e in experts]
        )

    def _part(self, weight: Tensor, axis: int) -> Tensor:
        return weight.chunk(self.tp_size, axis)[self.tp_rank]

    def megatron_to_hf(self, megatron_weights: Tensor | None, megatron_module: nn.Module | None) -> dict[str, Tensor]:
        """All experts' tensors, on every rank."""
        weight = self.broadcast_from_pp_rank(megatron_weights, cache_key=self.megatron_param)
        if weight is None:
            return {}
        weight = self.maybe_dequantize(weight)
        weight = torch.cat(self.gather_from_tp_ranks(weight.contiguous()), dim=_SHARED_AXIS)
        if self.ep_size > 1:
            parts = [torch.empty_like(weight) for _ in range(self.ep_size)]
            dist.all_gather(parts, weight, group=self.ep_group)
            weight = torch.cat(parts)
        if self._projections == ("down",):
            return {self.hf_param[f"{expert}.down"]: own for expert, own in enumerate(weight)}
        return {
            self.hf_param[f"{expert}.{name}"]: own
            for expert, both in enumerate(weight)
            for name, own in zip(self._projections, both, strict=True)
        }


class RefusedExpertsMapping(MegatronParamMapping):
    """Stands for `w_gate_up` or `w_down` where a checkpoint has its experts in another form, and says so when used."""

    is_expert = True

    def _validate_patterns(self) -> None:
        """The other side may have any names."""

    def hf_to_megatron(self, hf_weights: Any, megatron_module: nn.Module) -> Tensor:
        """Refused."""
        raise self._refusal()

    def megatron_to_hf(self, megatron_weights: Tensor | None, megatron_module: nn.Module | None) -> dict[str, Tensor]:
        """Refused."""
        raise self._refusal()

    def _refusal(self) -> ConfigError:
        return ConfigError(
            f"{self.megatron_param}: the checkpoint has {self.hf_param}, and GroupedExperts of parrot_sys reads one"
            " tensor for each expert and projection (gate, up, down): convert with Megatron's own experts, save with"
            " torch_dist, and load that with ours"
        )


def _patterns(mapping: Any) -> dict[str, str] | None:
    """Projection -> name in the checkpoint with a wildcard for the expert; None where its experts have another form."""
    name, theirs = mapping.megatron_param, mapping.hf_param
    if name.endswith(_GROUPED.format(2)):
        patterns, wanted = {"down": theirs}, {"down"}
    else:
        patterns, wanted = theirs, {"gate", "up"}
    known = isinstance(patterns, dict) and patterns.keys() == wanted
    if not known or getattr(mapping, "is_grouped_export", False):
        return None
    each = all(isinstance(found, str) and found.count("*") == name.count("*") for found in patterns.values())
    return patterns if each else None


def stacked_mappings(mappings: list[Any], num_experts: int) -> Iterator[MegatronParamMapping]:
    """Our mappings beside those for Megatron's grouped experts.

    Args:
        mappings: of a bridge.
        num_experts: E.
    """
    for mapping in mappings:
        name = mapping.megatron_param
        if not name.endswith((_GROUPED.format(1), _GROUPED.format(2))):
            continue
        ours = "w_gate_up" if name.endswith(_GROUPED.format(1)) else "w_down"
        if (patterns := _patterns(mapping)) is None:
            yield RefusedExpertsMapping(f"{name.partition('.experts.')[0]}.experts.{ours}", mapping.hf_param)
            continue
        names = {
            f"{expert}.{key}": str(expert).join(pattern.rsplit("*", 1))
            for expert in range(num_experts)
            for key, pattern in patterns.items()
        }
        yield StackedExpertsMapping(f"{name.partition('.experts.')[0]}.experts.{ours}", names)


def register() -> None:
    """Every bridge that is known by now maps our router and experts as well; calling it again is harmless."""
    AutoMapping.register_module_type("TokenRouter", "replicated")
    for bridge in _subclasses(MegatronModelBridge):
        own = vars(bridge).get("mapping_registry")
        if own is not None and not hasattr(own, "_parrot_sys"):
            bridge.mapping_registry = _extended(own)


def _extended(registry: Any) -> Any:
    def mapping_registry(self: Any) -> MegatronMappingRegistry:
        made = registry(self)
        if (num_experts := _num_experts(self)) is None:
            return made
        mappings = made.get_all_mappings()
        return MegatronMappingRegistry(*mappings, *stacked_mappings(mappings, num_experts))

    mapping_registry._parrot_sys = True  # type: ignore[attr-defined]
    return mapping_registry


def _num_experts(bridge: Any) -> int | None:
    """Experts of a layer, by any of the names that Megatron-Bridge knows for them."""
    config = getattr(bridge, "hf_config", None)
    for part in (config, getattr(config, "text_config", None)):
        for name, theirs in bridge.CONFIG_MAPPING:
            if theirs == "num_moe_experts" and isinstance(found := getattr(part, name, None), int):
                return found
    return None


def _subclasses(parent: Any) -> Iterator[Any]:
    for child in parent.__subclasses__():
        yield child
        yield from _subclasses(child)
