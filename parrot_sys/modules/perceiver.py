"""Perceiver resampler: any number of image rows to a fixed number of latents (Flamingo, arXiv 2204.14198).

The variant of OpenFlamingo 1 (mlfoundations/open_flamingo, src/helpers.py), without frame or media embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parrot_sys.errors import ConfigError

# n images, P rows of an image, L latents, C width of image features and latents


@dataclass(kw_only=True, frozen=True, slots=True)
class ResamplerConfig:
    """Shape of the resampler; the defaults are those of OpenFlamingo-9B."""

    num_latents: int = 64
    """L, number of rows that represent one image."""
    num_layers: int = 6
    """Blocks of attention and MLP."""
    num_attention_heads: int = 8
    """Heads of a block's attention."""
    head_dim: int = 64
    """Width of a head."""
    ffn_multiplier: int = 4
    """Inner width of a block's MLP in widths of the latents."""

    def __post_init__(self) -> None:
        for name in ("num_latents", "num_attention_heads", "head_dim", "ffn_multiplier"):
            if (size := getattr(self, name)) < 1:
                raise ConfigError(f"resampler.{name} must be >= 1, got {size}")
        if self.num_layers < 0:
            raise ConfigError(f"resampler.num_layers must be >= 0, got {self.num_layers}")


class PerceiverAttention(nn.Module):
    """Latents attend to the rows of their image and to each other; both are normalised first."""

    def __init__(self, config: ResamplerConfig, width: int, **factory: Any) -> None:
        super().__init__()
        inner = config.num_attention_heads * config.head_dim
        self.num_heads = config.num_attention_heads
        self.norm_media = nn.LayerNorm(width, **factory)
        self.norm_latents = nn.LayerNorm(width, **factory)
        self.to_q = nn.Linear(width, inner, bias=False, **factory)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False, **factory)
        self.to_out = nn.Linear(inner, width, bias=False, **factory)

    def forward(self, media: Tensor, latents: Tensor) -> Tensor:
        """[n, P, C] and [n, L, C] -> [n, L, C]."""
        latents = self.norm_latents(latents)
        rows = torch.cat((self.norm_media(media), latents), dim=1)
        query, key, value = (
            each.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for each in (self.to_q(latents), *self.to_kv(rows).chunk(2, dim=-1))
        )
        # Every latent sees all rows of its image: no mask, and images are of one length.
        out = F.scaled_dot_product_attention(query, key, value)
        projected: Tensor = self.to_out(out.transpose(1, 2).flatten(2))
        return projected


class FeedForward(nn.Module):
    """LayerNorm, Linear, GELU(erf), Linear; no biases in the linear layers."""

    def __init__(self, width: int, multiplier: int, **factory: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, **factory)
        self.linear_fc1 = nn.Linear(width, width * multiplier, bias=False, **factory)
        self.linear_fc2 = nn.Linear(width * multiplier, width, bias=False, **factory)

    def forward(self, rows: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        out: Tensor = self.linear_fc2(F.gelu(self.linear_fc1(self.norm(rows))))
        return out


class PerceiverBlock(nn.Module):
    """Attention and MLP, each added to the latents."""

    def __init__(self, config: ResamplerConfig, width: int, **factory: Any) -> None:
        super().__init__()
        self.attention = PerceiverAttention(config, width, **factory)
        self.mlp = FeedForward(width, config.ffn_multiplier, **factory)

    def forward(self, media: Tensor, latents: Tensor) -> Tensor:
        """[n, P, C] and [n, L, C] -> [n, L, C]."""
        latents = latents + self.attention(media, latents)
        rows: Tensor = latents + self.mlp(latents)
        return rows


class PerceiverResampler(nn.Module):
    """Learned latents read an image in several blocks; each image by itself."""

    def __init__(
        self,
        config: ResamplerConfig,
        width: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            config: number of latents and blocks.
            width: C, of the image features and of the latents.
            device: where the parameters are made.
            dtype: of the parameters.
        """
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.latents = nn.Parameter(torch.randn(config.num_latents, width, device=device, dtype=dtype))
        self.layers = nn.ModuleList(PerceiverBlock(config, width, **factory) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width, **factory)

    def forward(self, features: Tensor) -> Tensor:
        """Image rows [n, P, C] -> latents [n, L, C]; n may be 0."""
        latents = self.latents.expand(features.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(features, latents)
        normed: Tensor = self.norm(latents)
        return normed
