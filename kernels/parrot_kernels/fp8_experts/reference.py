"""Plain PyTorch `fp8_experts`: operands are quantised and scaled back, products are float32; any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from parrot_kernels.expert_mlp import reference as experts
from parrot_kernels.grouped_gemm import reference as grouped

BLOCK = 128
LARGEST = 448.0

Scales = tuple[float, float]


def why_not(*args: object) -> str | None:
    """The reference runs everywhere."""
    return None


def _quantize(blocks: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Blocks in float8, and their scales without `dims`."""
    largest = blocks.abs().amax(dims, keepdim=True)
    scales = torch.where(largest == 0, 1.0, largest / LARGEST)
    return (blocks / scales).to(torch.float8_e4m3fn), scales.squeeze(dims)


def _padded(x: Tensor, *dims: int) -> Tensor:
    """float32 with zeros up to the next multiple of BLOCK in the last `dims`."""
    padding = [part for size in dims for part in (0, -size % BLOCK)]
    return F.pad(x.float(), padding)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    width = x.shape[-1]
    q, scales = _quantize(_padded(x, width).unflatten(-1, (-1, BLOCK)), (-1,))
    return q.flatten(-2).view(torch.uint8)[..., :width].contiguous().view(q.dtype), scales


def quantize_weights(w: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    w = w.mT if transposed else w
    rows, width = w.shape[1:]
    blocks = _padded(w, width, rows).unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))
    q, scales = _quantize(blocks, (2, 4))
    return q.flatten(3).flatten(1, 2).view(torch.uint8)[:, :rows, :width].contiguous().view(q.dtype), scales


def rounded_rows(x: Tensor) -> Tensor:
    """float32 that the quantised rows of x [..., K] stand for."""
    q, scales = quantize_rows(x)
    return q.float() * scales.repeat_interleave(BLOCK, -1)[..., : x.shape[-1]]


def rounded_weights(w: Tensor) -> Tensor:
    """float32 that the quantised matrices w [..., N, K] stand for."""
    q, scales = quantize_weights(w.flatten(0, -3), False)
    spread = scales.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
    return (q.float() * spread[:, : w.shape[-2], : w.shape[-1]]).view(w.shape)


def m_grouped_gemm(x: Tensor, w: Tensor, offsets: Tensor, plan: Tensor | None, topk: int, trans_w: bool) -> Tensor:
    """See the contract in the package docstring."""
    return grouped.m_grouped_gemm(rounded_rows(x), rounded_weights(w), offsets, plan, topk, trans_w).to(x.dtype)


def m_grouped_swiglu(
    x: Tensor, w_gate_up: Tensor, offsets: Tensor, plan: Tensor | None, topk: int, weights: Tensor | None, save_z: bool
) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    operands = rounded_rows(x), rounded_weights(w_gate_up)
    h, z = grouped.m_grouped_swiglu(*operands, offsets, plan, topk, weights, save_z)
    return h.to(x.dtype), z.to(x.dtype)


def _operands(x: Tensor, w_gate_up: Tensor, w_down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return rounded_rows(x), rounded_weights(w_gate_up), rounded_weights(w_down)


def expert_mlp_dense_fwd(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, probs: Tensor, scales: Scales, save_z: bool
) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    operands = _operands(x, w_gate_up, w_down)
    out, z = experts.expert_mlp_dense_fwd(
        *operands, probs, (0.0, scales[1]), save_z, of_h=lambda h: rounded_rows(h.to(x.dtype))
    )
    return (scales[0] * x.float() + out).to(x.dtype), z.to(x.dtype)


def expert_mlp_topk_fwd(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    probs: Tensor,
    topk_indices: Tensor,
    expert_offsets: Tensor,
    plan: Tensor,
    scales: Scales,
    save_z: bool,
) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    operands, chosen = _operands(x, w_gate_up, w_down), (topk_indices, expert_offsets, plan)
    out, z = experts.expert_mlp_topk_fwd(
        *operands, probs, *chosen, (0.0, scales[1]), save_z, of_h=lambda h: rounded_rows(h.to(x.dtype))
    )
    return (scales[0] * x.float() + out).to(x.dtype), z.to(x.dtype)
