"""Gated cross-attention from text rows to the latents of images (Flamingo, arXiv 2204.14198), over packed samples.

Which image a row reads follows from the places of the image tokens. OpenFlamingo 1 (mlfoundations/open_flamingo,
src/helpers.py, MaskedCrossAttention) knows two rules, both for the one image next to a row:

* `previous` (its `attend_previous=True`): the last image at or before the row. What Flamingo describes.
* `next` (its `attend_previous=False`, what MultiModal-GPT was trained and is run with): an image token reads its own
  image, any other row the first image after it. Rows after the last image read nothing, so that question and answer
  know the image by self-attention only.

A row that reads no image gets zeros from the attention; its MLP runs all the same. Samples without any image pass the
block as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parrot_sys.errors import ConfigError
from parrot_sys.ops import segment_attention

# T rows of a pack, S samples, n images, L latents an image, M = n * L, H width of the rows, C width of the latents

MediaRule = Literal["previous", "next"]
LinearBuilder = Callable[[int, int], nn.Module]
"""(input width, output width) -> a linear layer without bias."""


@dataclass(kw_only=True, frozen=True, slots=True)
class GatedCrossAttentionConfig:
    """Shape of a gated block; the defaults are those of OpenFlamingo-9B."""

    num_attention_heads: int = 8
    """Heads of the cross-attention."""
    head_dim: int = 64
    """Width of a head."""
    ffn_multiplier: int = 4
    """Inner width of the block's MLP in widths of the decoder."""
    initial_gate: float = 0.0
    """Attention's gate, before tanh, in a new block. Flamingo's is closed (0), so that it disturbs nothing at first;
    but parameters after a closed gate learn only once the gate has moved, and runs of minutes have no time for it."""

    def __post_init__(self) -> None:
        for name in ("num_attention_heads", "head_dim", "ffn_multiplier"):
            if (size := getattr(self, name)) < 1:
                raise ConfigError(f"cross_attention.{name} must be >= 1, got {size}")
        if not math.isfinite(self.initial_gate):
            raise ConfigError(f"cross_attention.initial_gate must be a finite number, got {self.initial_gate}")


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaSpans:
    """Spans of the latents of a pack's images that each row reads."""

    start: Tensor  # int32 [T], first latent
    end: Tensor  # int32 [T], one past the last; equal to `start` where a row reads no image
    active: Tensor  # bool [T], whether the row's sample has an image at all

    def select(self, rows: Tensor) -> MediaSpans:
        """Selects the spans of some rows: int64 [T']."""
        return MediaSpans(**{name: getattr(self, name).index_select(0, rows) for name in ("start", "end", "active")})

    def reading_nothing(self) -> MediaSpans:
        """The same rows, reading no image."""
        return replace(self, end=self.start)


def media_spans(media_rows: Tensor, cu_seqlens: Tensor, num_rows: int, num_latents: int, rule: MediaRule) -> MediaSpans:
    """The latents that each row reads; no value is looked at on the host.

    Args:
        media_rows: int64 [n], rows of the image tokens, ascending; image i is the i-th of them.
        cu_seqlens: int32 [S + 1], sample boundaries.
        num_rows: T.
        num_latents: L.
        rule: see the head of this file.
    """
    is_media = torch.zeros(num_rows, dtype=torch.int64, device=cu_seqlens.device).index_fill_(0, media_rows, 1)
    before = F.pad(is_media.cumsum(0), (1, 0))  # [T + 1], images before each row
    samples = cu_seqlens.diff().long()
    first, last = (
        before[bounds.long()].repeat_interleave(samples, output_size=num_rows)
        for bounds in (cu_seqlens[:-1], cu_seqlens[1:])
    )
    if rule == "next":
        image = before[:-1]  # as many as lie before the row: the next one, or the row's own
        reads = image < last
    else:
        image = before[1:] - 1
        reads = image >= first
    start = torch.where(reads, image * num_latents, 0)
    return MediaSpans(start=start.int(), end=torch.where(reads, start + num_latents, start).int(), active=first < last)


def _linear(input_size: int, output_size: int) -> nn.Module:
    return nn.Linear(input_size, output_size, bias=False)


def _apply(layer: nn.Module, rows: Tensor) -> Tensor:
    """Megatron's linear layers return a bias as well."""
    out = layer(rows)
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


class CrossAttention(nn.Module):
    """Rows of a pack attend to the latents of one image each: LN -> q; k and v from the latents; no biases.

    `to_kv` gives, head by head, its key and then its value columns, so that heads can be cut over ranks. (The released
    layout has all keys first.)
    """

    def __init__(
        self,
        config: GatedCrossAttentionConfig,
        hidden_size: int,
        media_size: int,
        *,
        column: LinearBuilder = _linear,
        memory: LinearBuilder = _linear,
        row: LinearBuilder = _linear,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            config: heads.
            hidden_size: H.
            media_size: C.
            column: builds `to_q`; may give the columns of some of the heads only.
            memory: builds `to_kv` for the same heads.
            row: builds `to_out`, which then takes those columns and gives the sum over the ranks.
            dtype: of the norm.
        """
        super().__init__()
        inner = config.num_attention_heads * config.head_dim
        self.head_dim = config.head_dim
        self.norm = nn.LayerNorm(hidden_size, dtype=dtype)
        self.to_q = column(hidden_size, inner)
        self.to_kv = memory(media_size, 2 * inner)
        self.to_out = row(inner, hidden_size)

    def keys_values(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [M, heads, d] of latents [M, C]."""
        key, value = _apply(self.to_kv, latents).unflatten(-1, (-1, 2, self.head_dim)).unbind(-2)
        return key, value

    def forward(self, hidden: Tensor, key: Tensor, value: Tensor, spans: MediaSpans) -> Tensor:
        """[T, ..., H] -> [T, ..., H]; keys and values from `keys_values`."""
        query = _apply(self.to_q, self.norm(hidden))
        heads = query.view(query.shape[0], -1, self.head_dim)
        out, _ = segment_attention(heads, key, value, spans.start, spans.end, scale=self.head_dim**-0.5)
        return _apply(self.to_out, out.reshape(query.shape))


class GatedFeedForward(nn.Module):
    """LN, Linear, GELU(erf), Linear; no biases in the linear layers."""

    def __init__(
        self,
        hidden_size: int,
        multiplier: int,
        *,
        column: LinearBuilder = _linear,
        row: LinearBuilder = _linear,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, dtype=dtype)
        self.linear_fc1 = column(hidden_size, hidden_size * multiplier)
        self.linear_fc2 = row(hidden_size * multiplier, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        return _apply(self.linear_fc2, F.gelu(_apply(self.linear_fc1, self.norm(hidden))))


class GatedCrossAttention(nn.Module):
    """x += tanh(attention_gate) * attention(x); x += tanh(mlp_gate) * mlp(x)."""

    def __init__(
        self,
        config: GatedCrossAttentionConfig,
        hidden_size: int,
        media_size: int,
        *,
        column: LinearBuilder = _linear,
        memory: LinearBuilder = _linear,
        row: LinearBuilder = _linear,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            config: heads and inner width.
            hidden_size: H.
            media_size: C.
            column, memory, row: build the linear layers; see `CrossAttention`.
            dtype: of norms and gates.
        """
        super().__init__()
        builders: dict[str, Any] = {"column": column, "row": row, "dtype": dtype}
        self.attention = CrossAttention(config, hidden_size, media_size, memory=memory, **builders)
        self.attention_gate = nn.Parameter(torch.full((1,), config.initial_gate, dtype=dtype))
        self.mlp = GatedFeedForward(hidden_size, config.ffn_multiplier, **builders)
        self.mlp_gate = nn.Parameter(torch.zeros(1, dtype=dtype))

    def forward(self, hidden: Tensor, key: Tensor, value: Tensor, spans: MediaSpans, active: Tensor) -> Tensor:
        """
        Args:
            hidden: [T, ..., H], or under sequence parallelism this rank's part of the rows.
            key, value: [M, heads, d], from `attention.keys_values`.
            spans: latents that each of the T rows reads.
            active: bool, as many as rows in `hidden`: rows of samples with an image; the others stay as they are.
        """
        read = hidden + self.attention_gate.tanh() * self.attention(hidden, key, value, spans)
        read = read + self.mlp_gate.tanh() * self.mlp(read)
        return torch.where(active.view(-1, *[1] * (hidden.dim() - 1)), read, hidden)

    def passed(self, hidden: Tensor) -> Tensor:
        """`hidden` for micro-batches without any image, tied to the parameters that learn.

        Data-parallel reduction waits for the gradient of every one of them, so they get one of zeros.
        """
        return tie(hidden, self.parameters())


def tie(rows: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """`rows`, whose backward pass gives each of the parameters that learn a gradient of zeros."""
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    if not (learning and torch.is_grad_enabled()):
        return rows
    return rows + torch.stack([parameter.flatten()[:0].sum() for parameter in learning]).sum().to(rows.dtype)
