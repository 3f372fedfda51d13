"""`paged_layer`: a decoder layer for the rows of a step over a paged cache, in one call; for inference."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from parrot_sys.ops import registry


class LayerWeights(NamedTuple):
    """Weights of a decoder layer with H hidden columns and g key heads of width d with r query heads each."""

    norm_1: Tensor
    """[H], of the RMS norm before attention."""
    w_qkv: Tensor
    """[g (r + 2) d, H]."""
    b_qkv: Tensor | None
    """[g (r + 2) d]."""
    q_norm: Tensor | None
    """[d], of RMS norms of the query heads ..."""
    k_norm: Tensor | None
    """... and of the key heads."""
    w_out: Tensor
    """[H, g r d]."""
    norm_2: Tensor
    """[H], of the RMS norm before the gated MLP."""
    w_gate_up: Tensor
    """[2 I, H]."""
    w_down: Tensor
    """[H, I]."""


def paged_layer(
    hidden: Tensor,
    weights: LayerWeights,
    turns: tuple[Tensor, Tensor],
    caches: tuple[Tensor, Tensor],
    places: tuple[Tensor, Tensor],
    requests: tuple[Tensor, Tensor, Tensor],
    *,
    eps: float,
    scale: float,
) -> Tensor:
    """Output [T, H] of a layer; keys and values of the rows are in the caches after it.

    It is no operator of PyTorch's dispatcher, since it writes to the caches: nothing that records or transforms calls
    sees it. It is made for some 32 rows at most.

    Args:
        hidden: [T, H].
        weights: of the layer, dtype of `hidden`.
        turns: from `parrot_sys.modules.rotary.turning`, for the rows.
        caches: keys and values [B, g, N, d].
        places: block and row in it, int64 [T], where each row's key and value go.
        requests: block tables int32 [S, W], boundaries of the requests' rows int32 [S + 1], rows of each in the cache
            int32 [S], these included.
        eps: of all norms.
        scale: factor of the scores.
    """
    norm_1, w_qkv, b_qkv, q_norm, k_norm, *rest = weights
    args = (norm_1, w_qkv, b_qkv, q_norm, k_norm, *turns, *caches, *places, *requests, *rest, eps, scale)
    out: Tensor = registry.select("paged_layer", hidden, *args).paged_layer(hidden, *args)
    return out
