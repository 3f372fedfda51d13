"""Learners of Wings beside vLLM's decoder layers: their memory and the router's columns live in vLLM's KV cache.

T rows of a step, n heads on this rank, d = H / heads, w width of a row in the cache, r rank of the learners.

A row is memory of one kind at most (a picture's, a word's, or neither), so each has one key and one value a layer, made
by the learner of its kind. Both learners' queries go over that one cache as two query heads of one key head. Columns
behind the d say what a row is: the queries of a learner have a 1 in its column, where keys of other rows have a large
negative number, and values a 1 or 0, which tells whether a query saw anything.

Attention weights do not leave vLLM's kernels. The router sums columns by them over keys and heads, so the columns ride
behind the values of the layer's own attention, by the positions of the rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.attention import Attention

from parrot_sys.errors import ConfigError
from parrot_sys.modules.learners import LearnerRouter, LorraLearner
from parrot_sys.modules.rotary import rotary_cos_sin, rotate
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.wings.config import WingsConfig

_UNSEEN = -1e4
"""Added (times the scale of the scores) where a query must not look; exact enough in bfloat16, and fits float16."""
_WIDEST = 512


class Step(nn.Module):
    """Tensors that the layers read besides their rows; they stay where they are, and are filled before each step."""

    memory: Tensor
    positions: Tensor
    kinds: Tensor
    pictured: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, model: ParrotConfig, rows: int, dtype: torch.dtype) -> None:
        """
        Args:
            model: of the checkpoint.
            rows: at most in a step.
            dtype: of the rows.
        """
        super().__init__()
        llm = model.llm
        self.base, self.width = llm.rope_base, llm.hidden_size // llm.num_attention_heads
        half = (rows, 1, self.width // 2)
        for name, tensor in {
            "memory": torch.zeros(rows, llm.hidden_size, dtype=dtype),
            "positions": torch.zeros(rows, dtype=torch.int64),
            "kinds": torch.zeros(rows, 2, dtype=torch.bool),
            "pictured": torch.zeros(rows, 1, dtype=torch.bool),
            "cos": torch.zeros(half, dtype=dtype),
            "sin": torch.zeros(half, dtype=dtype),
        }.items():
            self.register_buffer(name, tensor, persistent=False)

    def begin(self, memory: Tensor, positions: Tensor, kinds: Tensor, pictured: Tensor) -> None:
        """Fills the first T rows.

        Args:
            memory: [T, H], input of the first layer.
            positions: [T], places in the requests.
            kinds: bool [T, 2], whether each row is read by visual and by textual learners.
            pictured: bool [T], whether its request has pictures.
        """
        cos, sin = rotary_cos_sin(positions, self.width, self.base, self.cos.dtype)
        values = {"memory": memory, "positions": positions, "kinds": kinds, "pictured": pictured[:, None]}
        for name, value in {**values, "cos": cos, "sin": sin}.items():
            self.get_buffer(name)[: len(value)].copy_(value)


class Learners(nn.Module):
    """Both learners of a layer and its router; without `routed` the visual learner alone (Wings' first stage)."""

    def __init__(self, model: ParrotConfig, layer: int, step: Step, config: VllmConfig, prefix: str, *, routed: bool):
        """
        Args:
            model: of the checkpoint.
            layer: number of the layer.
            step: shared by all layers.
            config: of the engine.
            prefix: of the layer's name.
            routed: whether textual learners and routers take part.
        """
        super().__init__()
        wings, llm, dtype = model.wings, model.llm, config.model_config.dtype
        assert isinstance(wings, WingsConfig), "the registry chose this system"
        ranks = get_tp_group()
        group = ranks.device_group if ranks.world_size > 1 else None
        sizes = (llm.hidden_size, llm.num_attention_heads, wings.rank)
        self.layer, self.rank = layer, wings.rank
        self.visual_learner = LorraLearner(*sizes, dtype=dtype, group=group)
        self.textual_learner = LorraLearner(*sizes, dtype=dtype, group=group) if routed else None
        self.router = LearnerRouter(wings.router_positions, dtype=dtype, group=group) if routed else None
        for part in self.children():
            part.group = None  # (of gradients, which there are none here: what compiles the layers cannot follow it)
        self.even = wings.routing == "even"
        self.attended: Tensor | None = None
        self._step = (step,)  # (not a part of each layer)
        self.heads, self.width, self.count = self.visual_learner.num_heads, self.visual_learner.head_dim, 1 + routed
        wide = _cache_width(self.width + self.count, config)
        name = f"{prefix}.learners.memory"
        self.memory = Attention(
            self.heads * self.count,
            wide,
            self.width**-0.5,
            num_kv_heads=self.heads,
            cache_config=config.cache_config,
            prefix=name,
        )
        marks = torch.eye(self.count, dtype=dtype)
        self.register_buffer("marks", marks, persistent=False)

    @property
    def step(self) -> Step:
        """Shared by all layers."""
        return self._step[0]

    def forward(self, rows: Tensor) -> Tensor:
        """[T, H] after the layer's attention -> what is added to them."""
        step, count = self.step, len(rows)
        kinds = step.kinds[:count, : self.count]
        learners = [self.visual_learner] + ([] if self.textual_learner is None else [self.textual_learner])
        out = self._attend(rows, learners, kinds)
        parts = []
        for i, learner in enumerate(learners):
            saw = out[:, :, i, self.width + i, None] > 0.5
            parts.append(learner.read(torch.where(saw, out[:, :, i, : self.width], 0.0)))
        if self.attended is not None:
            parts.append(self.attended)
        # One message for all, summed in float32.
        summed = torch.cat([part.float() for part in parts], dim=1)
        if get_tp_group().world_size > 1:
            summed = tensor_model_parallel_all_reduce(summed)
        read = [
            F.linear(part.to(rows.dtype), learner.o_up)
            for part, learner in zip(summed.split(self.rank, dim=1), learners, strict=False)
        ]
        if self.router is None:
            return read[0]
        routed = summed.new_full((count, 2), 0.5) if self.even else self.router(summed[:, -2:])
        alone = torch.arange(2.0, device=rows.device)  # without pictures: nothing visual, the text as it is
        weights = torch.where(step.pictured[:count], routed, alone).to(rows.dtype)
        return weights[:, :1] * read[0] + weights[:, 1:] * read[1]

    def _attend(self, rows: Tensor, learners: list[LorraLearner], kinds: Tensor) -> Tensor:
        """[T, n, learners, w], what the queries of each learner read."""
        step, count, wide = self.step, len(rows), self.memory.head_size
        memory, cos, sin = step.memory[:count], step.cos[:count], step.sin[:count]
        key, value = self.visual_learner.key_value(memory)
        if self.textual_learner is not None:
            others = self.textual_learner.key_value(memory)
            visual = kinds[:, :1, None]
            key, value = torch.where(visual, key, others[0]), torch.where(visual, value, others[1])
        flags = kinds[:, None].expand(-1, self.heads, -1).to(key.dtype)
        key = _widened(rotate(key, cos, sin), (1 - flags) * _UNSEEN, wide)
        value = _widened(value, flags, wide)
        queries = torch.stack([rotate(learner.query(rows), cos, sin) for learner in learners], dim=2)
        query = _widened(queries, self.marks.expand(*queries.shape[:2], -1, -1), wide)
        out = self.memory(query.flatten(1), key.flatten(1), value.flatten(1))
        return out.view(count, self.heads, len(learners), wide)


class RoutedAttention(nn.Module):
    """A layer's attention, and what its weights make of the router's columns."""

    def __init__(self, attention: Attention, learners: Learners, config: VllmConfig) -> None:
        """
        Args:
            attention: that of the layer, which this one replaces.
            learners: of the layer, which get the sums.
            config: of the engine.
        """
        super().__init__()
        self.width, self.heads, self.groups = attention.head_size, attention.num_heads, attention.num_kv_heads
        self._learners = (learners,)  # (a part of the layer elsewhere)
        del config.compilation_config.static_forward_context[attention.layer_name]
        self.wide = Attention(
            self.heads,
            _cache_width(self.width + 2, config),
            attention.impl.scale,
            num_kv_heads=self.groups,
            cache_config=config.cache_config,
            quant_config=attention.quant_config,
            prefix=attention.layer_name,
        )

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The attention's [T, n d]."""
        (learners,), count, wide = self._learners, len(query), self.wide.head_size
        assert learners.router is not None, "routed layers have one"
        columns = learners.router.weight.t()[learners.step.positions[:count]]
        columns = columns[:, None].expand(-1, self.groups, -1)
        query = F.pad(query.view(count, self.heads, self.width), (0, wide - self.width))
        key = F.pad(key.view(count, self.groups, self.width), (0, wide - self.width))
        value = _widened(value.view(count, self.groups, self.width), columns, wide)
        out = self.wide(query.flatten(1), key.flatten(1), value.flatten(1)).view(count, self.heads, wide)
        learners.attended = out[..., self.width : self.width + 2].float().sum(1)
        return out[..., : self.width].flatten(1)


class LearnersThenNorm(nn.Module):
    """Learners between a layer's attention and its next norm, in the place of the latter."""

    def __init__(self, norm: nn.Module, learners: Learners) -> None:
        """
        Args:
            norm: before the layer's MLP.
            learners: of the layer.
        """
        super().__init__()
        self.norm, self.learners = norm, learners

    def forward(self, attended: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """See vLLM's `RMSNorm` with a residual."""
        rows = residual + attended
        rows = rows + self.learners(rows)
        return self.norm(rows), rows


def add_learners(
    decoder: Any, model: ParrotConfig, step: Step, config: VllmConfig, prefix: str, *, routed: bool
) -> None:
    """Puts learners into the layers of this stage.

    Args:
        decoder: vLLM's, with `layers`, each with `self_attn.attn` and `post_attention_layernorm`.
        model: of the checkpoint.
        step: shared by all layers.
        config: of the engine.
        prefix: of the decoder's name.
        routed: whether textual learners and routers take part.

    Raises:
        ConfigError: a KV cache of 8 bits.
    """
    assert model.wings is not None, "the registry chose this system"
    if config.cache_config.cache_dtype not in ("auto", "float16", "bfloat16", "float32"):
        raise ConfigError(
            f"kv_cache_dtype={config.cache_config.cache_dtype!r}: what tells the learners' rows apart is a number that "
            "the KV cache must hold in 16 bits at least"
        )
    for number in filter(model.wings.has_learners, range(decoder.start_layer, decoder.end_layer)):
        layer = decoder.layers[number]
        learners = Learners(model, number, step, config, f"{prefix}.layers.{number}", routed=routed)
        if routed and not learners.even:
            layer.self_attn.attn = RoutedAttention(layer.self_attn.attn, learners, config)
        layer.post_attention_layernorm = LearnersThenNorm(layer.post_attention_layernorm, learners)


def _cache_width(least: int, config: VllmConfig) -> int:
    """The narrowest head with `least` columns that the attention of this machine takes."""
    from vllm.platforms import current_platform

    sizes = _cpu_sizes() if current_platform.is_cpu() else range(8, _WIDEST + 1, 8)
    for size in sizes:
        if size >= least:
            return size
    raise ConfigError(f"heads of {least} columns in the KV cache, learners' included: there is no attention for them")


def _cpu_sizes() -> list[int]:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return CPUAttentionBackend.get_supported_head_sizes()


def _widened(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """[..., d] and [..., c] -> [..., width], with zeros behind."""
    return F.pad(torch.cat((rows, columns.to(rows.dtype)), dim=-1), (0, width - rows.shape[-1] - columns.shape[-1]))
