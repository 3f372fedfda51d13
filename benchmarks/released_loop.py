"""The released code's way through the text-guided MoE, as baseline: a Python loop over samples and over experts."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parrot_sys.modules.released_experts import experts_to_released
from parrot_sys.modules.routing_config import TextGuidedMoEConfig


class ReleasedLoop(nn.Module):
    """Parameters and rules of the public Parrot code; `topk` runs only the chosen experts of each sample."""

    def __init__(self, config: TextGuidedMoEConfig, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        released = experts_to_released(state)
        self.router = nn.Parameter(released["gate.weight"].clone())
        self.experts = nn.ModuleList(
            nn.ParameterDict(
                {part: released[f"experts.{e}.{part}_proj.weight"].clone() for part in ("gate", "up", "down")}
            )
            for e in range(config.num_experts)
        )

    def forward(self, features: Tensor, text: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """[n, V, H] -> [n, V, H]."""
        spans = zip(features, start.tolist(), end.tolist(), strict=True)
        return torch.stack([self._sample(rows, text[first:last]) for rows, first, last in spans])

    def _sample(self, rows: Tensor, text: Tensor) -> Tensor:
        config = self.config
        attention = (rows[:1] @ text.T / math.sqrt(rows.shape[1])).softmax(-1)
        probs = F.linear(attention @ text, self.router).softmax(-1)[0]
        chosen = range(config.num_experts)
        if config.routing == "topk":
            values, indices = probs.topk(config.topk)
            probs = torch.zeros_like(probs).index_put((indices,), values / values.sum())
            chosen = indices.tolist()
        output = config.residual_weight * rows
        for e in chosen:
            expert = self.experts[e]
            hidden = F.silu(F.linear(rows, expert["gate"])) * F.linear(rows, expert["up"])
            output = output + probs[e] * F.linear(hidden, expert["down"])
        return output
