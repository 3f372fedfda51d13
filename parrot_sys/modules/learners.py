"""Modality learners (LoRRA) of Wings (arXiv 2406.03496): low-rank attention beside a decoder layer, and their router.

T rows of a pack, M rows of a memory, H hidden size, n heads on this rank, d = H / heads, r rank of the learners.

    u  = x + SelfAttention(Norm(x))
    y  = O_up O_down softmax(q k^T / sqrt(d)) v,  q = u + Q_up Q_down u,  k, v likewise of the memory
    w  = softmax(SiLU(bias + sum over heads of attention weights . columns))     two numbers a row
    u' = u + w_v y_visual + w_t y_textual

Every `up` is zero at the start, so that the learners add nothing. Under tensor parallelism each rank has its heads:
what it returns are partial sums, which the caller adds up over the ranks (r numbers a row), and so are its gradients
with respect to rows and memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from parrot_sys.errors import ConfigError
from parrot_sys.ops import segment_attention
from parrot_sys.parallel import copy_to_group

Rule = Literal["paper", "released"]
Routing = Literal["attention", "even"]
CUT_DIMS = {"q_up": 0, "k_up": 0, "v_up": 0, "o_down": 1}
"""Parameters of a learner of which each tensor-parallel rank holds a part -> the dimension that is cut."""


@dataclass(kw_only=True, frozen=True, slots=True)
class LearnersConfig:
    """Learners and routers; the defaults are those of the released training scripts."""

    key: ClassVar[str] = "learners"
    """Name of these settings in messages."""
    rank: int = 64
    """r, inner width of the learners' projections (Hugging Face: lora_dim)."""
    layers: tuple[int, ...] | None = None
    """Decoder layers with learners, counted from 0; all of them when not set."""
    system_prompt_length: int = 14
    """Rows at the beginning of a sample with images that its textual learners do not read (14: ChatML)."""
    router_positions: int = 4096
    """Longest sample: the router has two weights for each position."""
    routing: Routing = "attention"
    """`attention`: the router weighs both learners by the layer's own attention; `even`: each has one half and the
    router is not used (ablation)."""
    rule: Rule = "paper"
    """`paper`: learners see no later row, the blend is added once; `released`: as the public code computes."""

    def __post_init__(self) -> None:
        for name in ("rank", "router_positions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{self.key}.{name} must be >= 1, got {getattr(self, name)}")
        if self.system_prompt_length < 0:
            raise ConfigError(f"{self.key}.system_prompt_length must be >= 0, got {self.system_prompt_length}")
        for name, known in (("rule", get_args(Rule)), ("routing", get_args(Routing))):
            if (value := getattr(self, name)) not in known:
                raise ConfigError(f"{self.key}.{name} must be one of {', '.join(known)}, got {value!r}")
        if self.layers is not None and (not self.layers or list(self.layers) != sorted(set(self.layers))):
            raise ConfigError(
                f"{self.key}.layers must name each layer once, in ascending order, got {list(self.layers)}; "
                "unset it for all layers"
            )

    def has_learners(self, layer: int) -> bool:
        """Whether decoder layer `layer`, counted from 0, has learners."""
        return self.layers is None or layer in self.layers


class LorraLearner(nn.Module):
    """Low-rank residual attention of rows to a memory."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        rank: int,
        *,
        dtype: torch.dtype | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        """
        Args:
            hidden_size: H.
            num_heads: heads of the whole learner.
            rank: r.
            dtype: of the parameters.
            group: tensor-parallel ranks that share the heads.

        Raises:
            ConfigError: sizes that do not divide.
        """
        super().__init__()
        parts = 1 if group is None else group.size()
        if hidden_size % num_heads or num_heads % parts:
            raise ConfigError(
                f"a learner needs hidden_size to be a multiple of its heads and these of the {parts} ranks that share "
                f"them, got hidden_size {hidden_size} and {num_heads} heads"
            )
        self.num_heads, self.head_dim, self.group = num_heads // parts, hidden_size // num_heads, group
        place = 0 if group is None else group.rank()
        width = self.num_heads * self.head_dim
        self._columns = slice(place * width, (place + 1) * width)
        for name in ("q", "k", "v"):
            self.register_parameter(f"{name}_down", nn.Parameter(_small(rank, hidden_size, dtype)))
            self.register_parameter(f"{name}_up", nn.Parameter(torch.zeros(width, rank, dtype=dtype)))
        self.o_down = nn.Parameter(_small(rank, hidden_size, dtype)[:, self._columns].clone())
        self.o_up = nn.Parameter(torch.zeros(hidden_size, rank, dtype=dtype))

    def query(self, rows: Tensor) -> Tensor:
        """[T, H] -> [T, n, d]."""
        return self._project(rows, "q")

    def key_value(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """[M, H] -> [M, n, d] twice."""
        return self._project(memory, "k"), self._project(memory, "v")

    def attend(self, query: Tensor, key: Tensor, value: Tensor, segments: Tensor) -> Tensor:
        """This rank's part of what each row reads.

        Args:
            query: [T, n, d], rotated.
            key: [M, n, d], rotated.
            value: [M, n, d].
            segments: int32 [T, 2], first memory row that each row sees and one past the last.

        Returns:
            [T, r], to be summed over the ranks and multiplied by `o_up`; zeros where a row sees nothing.
        """
        start, end = (bound.contiguous() for bound in segments.unbind(1))
        out, _ = segment_attention(query, key, value, start, end, scale=self.head_dim**-0.5)
        return self.read(out)

    def read(self, attended: Tensor) -> Tensor:
        """This rank's part of what rows read, [T, r], from what its heads' attention gave, [T, n, d]."""
        return F.linear(attended.flatten(1), self.o_down)

    def _project(self, rows: Tensor, name: str) -> Tensor:
        # Each rank uses the whole `down` for its own heads.
        down = copy_to_group(self.get_parameter(f"{name}_down"), self.group)
        low_rank = F.linear(F.linear(rows, down), self.get_parameter(f"{name}_up"))
        return (rows[:, self._columns] + low_rank).unflatten(1, (self.num_heads, self.head_dim))


class LearnerRouter(nn.Module):
    """Weights of visual and textual learner for each row, from the layer's own attention."""

    def __init__(self, positions: int, *, dtype: torch.dtype | None = None, group: ProcessGroup | None = None) -> None:
        """
        Args:
            positions: P, longest sample.
            dtype: of the parameters.
            group: tensor-parallel ranks, each with the attention of its own heads.
        """
        super().__init__()
        linear = nn.Linear(positions, 2, dtype=dtype)
        self.weight, self.bias = linear.weight, linear.bias
        self.group = group

    def columns(self) -> Tensor:
        """[P, 2]: what `router_attention` sums by the attention weights of this rank's heads."""
        return copy_to_group(self.weight, self.group).t().contiguous()

    def forward(self, attended: Tensor, *, shared_bias: ProcessGroup | None = None) -> Tensor:
        """Weights, [T, 2], of each row, from what its heads' attention gave, float [T, 2].

        Args:
            attended: summed over all heads, of all ranks.
            shared_bias: ranks of which each has rows of its own here.
        """
        bias = copy_to_group(self.bias, shared_bias)
        return F.silu(attended + bias.to(attended.dtype)).softmax(-1)


def _small(rank: int, width: int, dtype: torch.dtype | None) -> Tensor:
    return nn.init.trunc_normal_(torch.empty(rank, width, dtype=dtype), std=0.02)
