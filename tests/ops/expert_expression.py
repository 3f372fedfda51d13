"""What the tests of `expert_mlp` compare with: the formula as a loop."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def expression(leaves: dict[str, Tensor], probs: Tensor, residual: float, scale: float) -> Tensor:
    """The formula, image by image and expert by expert, in the dtype of x; experts of weight zero still run."""
    x, w_gate_up, w_down = leaves["x"], leaves["w_gate_up"], leaves["w_down"]
    images = []
    for rows, weights in zip(x, probs.to(x.dtype), strict=True):
        total = torch.zeros_like(rows)
        for (gate, up), down, weight in zip(w_gate_up, w_down, weights, strict=True):
            total = total + weight * ((F.silu(rows @ gate.T) * (rows @ up.T)) @ down)
        images.append(residual * rows + scale * total)
    if not images:
        return x + 0 * (w_gate_up.sum() + w_down.sum() + probs.sum())
    return torch.stack(images)


def launchers(sparse: bool) -> tuple[str, ...]:
    """Names of the forward and the backward launcher."""
    form = "topk" if sparse else "dense"
    return f"expert_mlp_{form}_fwd", f"expert_mlp_{form}_bwd"
