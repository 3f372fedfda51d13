"""Plain PyTorch `paged_layer`, of the references that it is made of; any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from parrot_kernels.few_rows_linear.reference import few_rows_linear
from parrot_kernels.paged_attention.reference import paged_attention

# T rows, H hidden size, g key heads of width d with r query heads each


def why_not(*args: object) -> str | None:
    """The reference runs everywhere."""
    return None


def paged_layer(
    hidden: Tensor,
    norm_1: Tensor,
    w_qkv: Tensor,
    b_qkv: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    blocks: Tensor,
    offsets: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    kv_lengths: Tensor,
    w_out: Tensor,
    norm_2: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    eps: float,
    scale: float,
) -> Tensor:
    """See the contract in the package docstring."""
    groups, width = key_cache.shape[1], key_cache.shape[3]
    mixed = few_rows_linear(hidden, w_qkv, norm_1, b_qkv, None, False, eps)
    heads = mixed.view(len(hidden), groups, w_out.shape[1] // (groups * width) + 2, width)
    query = _turned(heads[:, :, :-2], q_norm, cos, sin, eps).flatten(1, 2)
    key_cache[blocks, :, offsets] = _turned(heads[:, :, -2:-1], k_norm, cos, sin, eps).squeeze(2)
    value_cache[blocks, :, offsets] = heads[:, :, -1]
    longest = int(cu_seqlens_q.diff().max()) if len(kv_lengths) else 0
    requests = (block_tables, cu_seqlens_q, kv_lengths)
    read, _ = paged_attention(query, key_cache, value_cache, *requests, None, None, longest, scale)
    attended = few_rows_linear(read.flatten(1), w_out, None, None, hidden, False, eps)
    gates = few_rows_linear(attended, w_gate_up, norm_2, None, None, False, eps)
    return few_rows_linear(gates, w_down, None, None, attended, True, eps)


def _turned(heads: Tensor, norm: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Heads [T, g, r, d], normed where there is a norm, and turned."""
    acc = torch.promote_types(heads.dtype, torch.float32)
    rows = heads.to(acc)
    if norm is not None:
        rows = F.rms_norm(rows, norm.shape, norm.to(acc), eps)
    halves = rows.unflatten(-1, (2, -1))
    return (halves * cos.to(acc) + halves.flip(-2) * sin.to(acc)).flatten(-2).to(heads.dtype)
