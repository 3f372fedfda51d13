"""Router and experts for any Megatron `MoELayer` (token routing), on this package's ops.

Megatron's `MoELayer`, dispatchers, shared experts and optimizer stay as they are: `with_grouped_experts(layer_spec)`
only puts `TokenRouter` and `GroupedExperts` in the place of `TopKRouter` and `SequentialMLP` / `TEGroupedMLP`. Both
keep Megatron's parameter and checkpoint names, so that a checkpoint of either side loads on the other.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from parrot_sys.errors import ConfigError
from parrot_sys.megatron.embed import expert_weights
from parrot_sys.megatron.runtime.backends import ignore_extra_state
from parrot_sys.megatron.runtime.compat import moe_submodules, with_moe_submodules
from parrot_sys.ops import TopKRouting, m_grouped_gemm, m_grouped_swiglu, topk_routing

# T tokens, R = T * K routed rows, E experts, N experts of this rank, H hidden_size, I moe_ffn_hidden_size of this rank

_ROUTER_DTYPES = {None: None, "fp32": torch.float32, "fp64": torch.float64}


class TokenRouter(TopKRouter):
    """Megatron's `TopKRouter` with the op `topk_routing` in its middle.

    Parameters, buffers, auxiliary losses (`aux_loss`, `seq_aux_loss`, `global_aux_loss`, z-loss), expert bias, groups,
    capacity and logging are Megatron's own. Of equal logits the smaller expert number wins, on every device.
    """

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None, **kwargs: Any
    ) -> None:
        """
        Args:
            config: its `moe_*` fields, as for `TopKRouter`.
            pg_collection: process groups.
            **kwargs: what newer versions of Megatron-Core hand to a router.

        Raises:
            ConfigError: for a kind of routing that is not top-k of softmax or sigmoid scores.
        """
        _check_router(config)
        super().__init__(config=config, pg_collection=pg_collection, **kwargs)

    def gating(self, input: Tensor) -> Tensor:
        """Logits [s, b, E] of hidden states [s, b, H], in `moe_router_dtype` (that of the input when not set)."""
        dtype = _ROUTER_DTYPES[self.config.moe_router_dtype] or input.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(input.to(dtype), self.weight.to(dtype), bias)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None, **_: Any) -> tuple[Tensor, Tensor]:
        """Weights [T, E], zero for experts that were not chosen, and which were, [T, E] bool.

        Args:
            logits: [s, b, E], T = s * b.
            padding_mask: [s, b] bool, True for padding: such tokens count in no statistic.
        """
        config = self.config
        seq_length, batch_size = logits.shape[:2]
        logits = logits.reshape(-1, config.num_moe_experts)
        padding_mask = None if padding_mask is None else padding_mask.reshape(-1)
        logits = self.apply_z_loss(logits, padding_mask=padding_mask)
        routing = self._choose(logits)
        probs, chosen = routing.probs.to(logits.dtype), _routing_map(routing)
        if config.moe_expert_capacity_factor is not None:
            probs, chosen = apply_router_token_dropping(
                probs,
                chosen,
                router_topk=self.topk,
                capacity_factor=config.moe_expert_capacity_factor,
                drop_policy=config.moe_token_drop_policy,
                pad_to_capacity=config.moe_pad_expert_input_to_capacity,
            )
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            statistics = self._balance_statistics(logits, routing, padding_mask)
            masked = padding_mask is not None
            probs = self._apply_aux_loss(probs, *statistics, with_padding_mask=masked)
            probs = self._apply_seq_aux_loss(probs, *statistics, seq_length, batch_size, with_padding_mask=masked)
            probs = self._apply_global_aux_loss(probs, *statistics, with_padding_mask=masked)
        # Masked here: Megatron-Core's own mask is [T], which only fits [T, E] when T = E.
        self._apply_expert_bias(chosen if padding_mask is None else chosen & ~padding_mask.unsqueeze(-1))
        return probs, chosen

    def _choose(self, logits: Tensor) -> TopKRouting:
        config = self.config
        softmax = self.score_function == "softmax"
        grouped = bool(config.moe_router_group_topk)
        return topk_routing(
            logits,
            self.topk,
            # Softmax over the chosen logits is the softmax over all of them, divided by the sum of the chosen.
            renormalize=not config.moe_router_pre_softmax if softmax else self.topk > 1,
            score_function=self.score_function,
            scaling_factor=config.moe_router_topk_scaling_factor or 1.0,
            num_groups=config.moe_router_num_groups if grouped else 1,
            topk_groups=config.moe_router_group_topk if grouped else 1,
            expert_bias=None if softmax else self.expert_bias,
        )

    def _balance_statistics(
        self, logits: Tensor, routing: TopKRouting, padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Scores [T, E] of all experts and the choice [T, E] that the balancing losses look at.

        As in Megatron-Core, that choice knows neither groups nor the expert bias.
        """
        scores = routing.scores
        if self.score_function == "sigmoid":
            scores = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
        if self.config.moe_router_group_topk or self.expert_bias is not None:
            with torch.no_grad():
                routing = topk_routing(logits, self.topk, renormalize=False, score_function=self.score_function)
        chosen = _routing_map(routing)
        if padding_mask is None:
            return scores, chosen
        valid = ~padding_mask.unsqueeze(-1)
        return scores * valid, chosen & valid


def _routing_map(routing: TopKRouting) -> Tensor:
    return torch.zeros_like(routing.probs, dtype=torch.bool).scatter_(1, routing.topk_indices, True)


def _check_router(config: TransformerConfig) -> None:
    kinds = config.moe_router_load_balancing_type
    wrong = {"sinkhorn", "quantile_balancing"} & set(kinds if isinstance(kinds, list) else [kinds])
    if wrong:
        raise ConfigError(
            f"TokenRouter chooses the best scores, got moe_router_load_balancing_type={wrong.pop()!r}: "
            "keep Megatron's TopKRouter for it"
        )
    for name in ("moe_router_fusion", "moe_enable_routing_replay"):
        if getattr(config, name, False):
            raise ConfigError(f"TokenRouter does not know {name}: set it to False, or keep Megatron's TopKRouter")


class GroupedExperts(MegatronModule):
    """SwiGLU experts of one rank on grouped GEMMs: two products for all experts, in any dtype and on any device.

    Takes the place of `SequentialMLP` and `TEGroupedMLP` in `MoESubmodules.experts`. Parameters hold the weights of the
    N experts of this rank, cut along I over the expert tensor parallel group:
        w_gate_up  [N, 2, I, H], gate first: `linear_fc1.weight` of each expert
        w_down     [N, H, I], `linear_fc2.weight` of each expert
    Their initial values depend on the seed and the number of the expert, not on the expert parallel layout.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: Any = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        """
        Args:
            num_local_experts: N.
            config: SwiGLU without biases (`gated_linear_unit`, `activation_func=F.silu`, `add_bias_linear=False`).
            submodules: not used; other experts get their linear layers here.
            pg_collection: needs `ep`, `expt_tp` and `expt_dp`; those of `parallel_state` when not given.

        Raises:
            ConfigError: for experts of another kind.
        """
        super().__init__(config=config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group, self.dp_group = groups.ep, groups.expt_tp, groups.expt_dp
        ffn_size = config.moe_ffn_hidden_size or config.ffn_hidden_size
        _check_experts(config, ffn_size, self.tp_group.size())
        self.recompute = config.recompute_granularity == "selective" and "moe_act" in config.recompute_modules
        shape = (num_local_experts, ffn_size, config.hidden_size, self.tp_group.size())
        self.w_gate_up, self.w_down = expert_weights.allocate(config, *shape)
        if config.perform_initialization:
            expert_weights.initialize(config, self.w_gate_up, self.w_down, self.ep_group, self.tp_group)
        for weight in (self.w_gate_up, self.w_down):
            # Gradients of experts that other ranks do not have are reduced over the expert data parallel group.
            attributes = {"allreduce": config.expert_model_parallel_size == 1}
            attributes |= {"tensor_model_parallel": True, "partition_dim": 2, "partition_stride": 1}
            vars(weight).update(attributes)
        self.register_load_state_dict_post_hook(ignore_extra_state)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        experts, _, ffn_size, hidden_size = self.w_gate_up.shape
        return f"num_local_experts={experts}, hidden_size={hidden_size}, ffn_hidden_size={ffn_size}"

    def forward(
        self, hidden_states: Tensor, tokens_per_expert: Tensor, probs: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, None]:
        """Output of the experts for the rows a dispatcher brought here; a partial sum under expert tensor parallelism.

        Args:
            hidden_states: [R, H], sorted by expert; R may be 0.
            tokens_per_expert: [N] integers, on any device.
            probs: [R], weight of each row.

        Returns:
            [R, H], and None (there is no bias).
        """
        counts = tokens_per_expert.to(hidden_states.device, non_blocking=True)
        offsets = F.pad(counts.cumsum(0), (1, 0))
        weights: Tensor | None = probs.to(torch.promote_types(hidden_states.dtype, torch.float32))
        if self.config.moe_apply_probs_on_input:
            hidden_states, weights = (hidden_states * probs.unsqueeze(-1)).to(hidden_states.dtype), None
        inner = m_grouped_swiglu(hidden_states, self.w_gate_up, offsets, weights=weights, recompute=self.recompute)
        return m_grouped_gemm(inner, self.w_down, offsets), None

    def backward_dw(self) -> None:
        """Nothing: the gradients of the weights are formed in the backward pass."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Weights under the keys and in the layout of `SequentialMLP`, on whatever layout either is loaded."""
        groups = (self.ep_group, self.tp_group, self.dp_group)
        return expert_weights.sharded(self.w_gate_up, self.w_down, groups, prefix, sharded_offsets, metadata)


def _check_experts(config: TransformerConfig, ffn_size: int, tensor_parallel: int) -> None:
    if not (config.gated_linear_unit and config.activation_func is F.silu):
        raise ConfigError(
            "GroupedExperts are SwiGLU experts: set gated_linear_unit=True and activation_func=torch.nn.functional.silu"
        )
    wanted = {
        "add_bias_linear": False,
        "moe_latent_size": None,
        "fp8": None,
        "fp4": None,
        "glu_linear_offset": 0.0,
        "activation_func_clamp_value": None,
    }
    for name, value in wanted.items():
        got = getattr(config, name, value)
        if got != value and (got or value):  # (programs also say False for None)
            raise ConfigError(f"GroupedExperts need {name}={value}, got {got}: change it or keep Megatron's experts")
    if config.moe_apply_probs_on_input and config.moe_router_topk != 1:
        raise ConfigError(f"moe_apply_probs_on_input needs moe_router_topk=1, got {config.moe_router_topk}")
    if ffn_size % tensor_parallel:
        raise ConfigError(
            f"moe_ffn_hidden_size must be a multiple of expert_tensor_parallel_size={tensor_parallel}, got {ffn_size}: "
            f"use {ffn_size // tensor_parallel * tensor_parallel or tensor_parallel} or another size"
        )


def moe_layer_spec(*, use_te: bool = False) -> Any:
    """Megatron's `MoELayer` with `TokenRouter` and `GroupedExperts`, for the `mlp` of a layer spec.

    Args:
        use_te: linear layers of shared experts (built where `moe_shared_expert_intermediate_size` is set) from
            Transformer Engine.
    """
    return _with_ours(get_moe_module_spec(use_te=use_te, num_experts=1))


def with_grouped_experts(layer_spec: Any) -> Any:
    """A copy of a model's layer spec in which every `MoELayer` has `TokenRouter` and `GroupedExperts`.

    Args:
        layer_spec: what `GPTModel` takes as `transformer_layer_spec`: the ModuleSpec of a layer, or
            `TransformerBlockSubmodules` with a spec for each layer (dense layers stay as they are).

    Raises:
        ConfigError: no layer of it is a `MoELayer`.
    """
    changed = copy.deepcopy(layer_spec)
    layers = changed.layer_specs if isinstance(changed, TransformerBlockSubmodules) else [changed]
    mixtures = [layer for layer in layers if _has_experts(layer)]
    if not mixtures:
        raise ConfigError("the layer spec has no MoELayer: build it with num_experts, e.g. get_gpt_layer_local_spec(8)")
    # Layers of one kind may share one spec.
    for submodules in {id(layer.submodules): layer.submodules for layer in mixtures}.values():
        submodules.mlp = _with_ours(submodules.mlp)
    return changed


def _has_experts(layer: ModuleSpec) -> bool:
    return moe_submodules(getattr(layer.submodules, "mlp", None)) is not None


def _with_ours(mlp: Any) -> Any:
    submodules = dataclasses.replace(moe_submodules(mlp), experts=GroupedExperts, router=TokenRouter)
    return with_moe_submodules(mlp, submodules)
