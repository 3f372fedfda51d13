"""LoRA (arXiv 2106.09685): a low-rank update `scale * B A` beside a linear layer, which is usually frozen.

T rows, r rank. Works for any linear layer; `parrot_sys.megatron.lora` cuts it over tensor-parallel ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parrot_sys.errors import ConfigError

Target = Literal[
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "to_q",
    "to_kv",
    "to_out",
    "ff.1",
    "ff.3",
]
"""Released names of the linear layers that can have LoRA: in the decoder's attention (`q_proj` ...) and feed-forward
(`gate_proj` ...), in MultiModal-GPT's gated cross-attention (`to_q` ...) and its feed-forward (`ff.1` ...)."""


@dataclass(kw_only=True, frozen=True, slots=True)
class LoRAConfig:
    """Low-rank updates; on when one of these is set. The defaults are MultiModal-GPT's."""

    rank: int = 16
    """Rank of each update."""
    alpha: float = 16.0
    """An update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Share of the inputs of an update that training sets to zero."""
    targets: tuple[Target, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "to_q", "to_kv", "to_out", "ff.1", "ff.3")
    """Layers with updates, by their released names; those that the model does not have are left out."""

    @property
    def scale(self) -> float:
        """Factor of `B A`."""
        return self.alpha / self.rank

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"lora.rank must be >= 1, got {self.rank}")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ConfigError(f"lora.alpha must be a finite number > 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout must be in [0, 1), got {self.dropout}")
        if not self.targets or (unknown := [name for name in self.targets if name not in get_args(Target)]):
            raise ConfigError(
                f"lora.targets must name some of {', '.join(get_args(Target))}, "
                f"got {', '.join(unknown) if self.targets else 'none'}"
            )
        if len(set(self.targets)) < len(self.targets):
            raise ConfigError(f"lora.targets must name each layer once, got {', '.join(self.targets)}")


def _same(tensor: Tensor) -> Tensor:
    return tensor


class LoRA(nn.Module):
    """The update of one linear layer: `a` [r, in], `b` [out, r]; zero at the start, because `b` is."""

    def __init__(
        self, config: LoRAConfig, in_features: int, out_features: int, *, dtype: torch.dtype | None = None
    ) -> None:
        """
        Args:
            config: rank, scale and dropout.
            in_features: width of the rows that come in.
            out_features: width of the rows that go out.
            dtype: of the parameters.
        """
        super().__init__()
        self.config = config
        self.a = nn.Parameter(torch.empty(config.rank, in_features, dtype=dtype))
        self.b = nn.Parameter(torch.empty(out_features, config.rank, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """`a` as a new linear layer's weight (as peft does), `b` zero."""
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        nn.init.zeros_(self.b)

    def down(self, rows: Tensor) -> Tensor:
        """[..., in] -> [..., r], scaled; with dropout in training."""
        dropped = F.dropout(rows, self.config.dropout, self.training)
        return F.linear(dropped, self.a) * self.config.scale

    def up(self, hidden: Tensor) -> Tensor:
        """[..., r] -> [..., out]."""
        return F.linear(hidden, self.b)

    def forward(self, rows: Tensor, between: Callable[[Tensor], Tensor] = _same) -> Tensor:
        """[..., in] -> [..., out]: what is added to the linear layer's result.

        Args:
            rows: the linear layer's input.
            between: applied to the r-wide rows between `a` and `b` (a collective, where the matrices are cut).
        """
        return self.up(between(self.down(rows)))

    def update(self) -> Tensor:
        """`scale * b a` [out, in] in float32 (float64 stays): what merging adds to the linear layer's weight."""
        dtype = torch.promote_types(self.a.dtype, torch.float32)
        return (self.b.to(dtype) @ self.a.to(dtype)) * self.config.scale


def interleave(parts: list[Tensor], groups: int, dim: int) -> Tensor:
    """Joins the outputs of several projections as a fused layer holds them: group by group, in each one part after
    the other.

    Args:
        parts: equal but for their size along `dim`, which `groups` divides.
        groups: 1 puts one part after the other; for a fused query-key-value layer the number of query groups.
        dim: not negative.
    """
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.unflatten(dim, (groups, -1)) for part in parts], dim + 1).flatten(dim, dim + 1)
