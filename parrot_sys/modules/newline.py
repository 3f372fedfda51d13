"""Newline: the learned row after each line of a picture's tiles (LLaVA-NeXT)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Newline(nn.Module):
    """One row of the decoder's width that is put after the rows of all images, where `visual_source` finds it."""

    def __init__(
        self, hidden_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """
        Args:
            hidden_size: H, width of the row.
            device: where the parameter is made.
            dtype: of the parameter.
        """
        super().__init__()
        values = torch.empty(hidden_size, device=device, dtype=dtype)
        self.row = nn.Parameter(values.normal_(std=hidden_size**-0.5))

    def forward(self, features: Tensor) -> Tensor:
        """Rows [R, H] -> [R + 1, H]."""
        return torch.cat([features, self.row.to(features.dtype).unsqueeze(0)])
