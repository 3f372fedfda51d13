"""Plain PyTorch `expert_mlp`, fp32 inside; any device, no host synchronisation.

The top-k form masks: it runs every expert on every segment and keeps what was chosen, which is simple and free of
data-dependent shapes, but costs E / 1 times the work of a back end that follows the plan.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# n images, V rows an image, H hidden_size, E experts, I ffn_hidden_size, K topk, J <= n * K chosen segments

OfH = Callable[[Tensor], Tensor]
Scales = tuple[float, float]
Needs = tuple[bool, bool, bool, bool]


def why_not(*args: object) -> str | None:
    """The reference runs everywhere."""
    return None


def _acc(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _swiglu(z: Tensor) -> Tensor:
    """[..., 2, I] -> [..., I]."""
    gate, up = z.unbind(-2)
    return F.silu(gate) * up


def _swiglu_bwd(z: Tensor, grad: Tensor) -> Tensor:
    """Gradient with respect to z [..., 2, I] given that of the output [..., I]."""
    gate, up = z.unbind(-2)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    return torch.stack((grad * up * (sigmoid + silu * (1 - sigmoid)), grad * silu), dim=-2)


def _up(x: Tensor, w_gate_up: Tensor) -> Tensor:
    """[n, V, H] -> [E, n, V, 2, I]."""
    return torch.einsum("nvh,esih->envsi", x, w_gate_up).contiguous()


def _spread(probs: Tensor) -> Tensor:
    """[n, E] -> [E, n, 1, 1]."""
    return probs.T[:, :, None, None]


def _as_it_is(h: Tensor) -> Tensor:
    return h


def expert_mlp_dense_fwd(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    probs: Tensor,
    scales: Scales,
    save_z: bool,
    *,
    of_h: OfH = _as_it_is,
) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring; `of_h` is what the down-projection takes of the weighted h."""
    dtype, acc = x.dtype, _acc(x)
    x = x.to(acc)
    z = _up(x, w_gate_up.to(acc))
    out = torch.einsum("envi,eih->nvh", of_h(_swiglu(z) * _spread(probs)), w_down.to(acc))
    residual_scale, output_scale = scales
    y = (residual_scale * x + output_scale * out).to(dtype).contiguous()
    return y, z.to(dtype) if save_z else x.new_empty(0, dtype=dtype)


def expert_mlp_dense_bwd(
    grad: Tensor,
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    probs: Tensor,
    z: Tensor,
    scales: Scales,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See the contract in the package docstring."""
    dtype, acc = x.dtype, _acc(x)
    residual_scale, output_scale = scales
    needs_x, needs_gate_up, needs_down, needs_probs = needs
    grad, x, w_gate_up, w_down = (t.to(acc) for t in (grad, x, w_gate_up, w_down))
    z = z.to(acc) if z.numel() else _up(x, w_gate_up)
    none = x.new_empty(0, dtype=dtype)  # cloned for each use: outputs of an op must not alias

    h = _swiglu(z)
    grad_h = output_scale * torch.einsum("nvh,eih->envi", grad, w_down)
    grad_z = _swiglu_bwd(z, grad_h * _spread(probs))
    grad_x = none.clone()
    if needs_x:
        grad_x = (residual_scale * grad + torch.einsum("envsi,esih->nvh", grad_z, w_gate_up)).to(dtype).contiguous()
    weighted = output_scale * h * _spread(probs)
    return (
        grad_x,
        torch.einsum("envsi,nvh->esih", grad_z, x).to(dtype).contiguous() if needs_gate_up else none.clone(),
        torch.einsum("envi,nvh->eih", weighted, grad).to(dtype).contiguous() if needs_down else none.clone(),
        (h * grad_h).sum(dim=(2, 3)).T.contiguous() if needs_probs else probs.new_empty(0),
    )


def _segments(topk_indices: Tensor, plan: Tensor) -> tuple[Tensor, Tensor]:
    """Image [J] and expert [J] of each chosen segment, in the order of the plan."""
    return plan // topk_indices.shape[1], topk_indices.flatten()[plan]


def _up_segments(x: Tensor, w_gate_up: Tensor, image: Tensor, expert: Tensor) -> Tensor:
    """[J, V, 2, I]: each segment's image through its expert."""
    rows = x[image]
    z = rows.new_zeros(*rows.shape[:2], *w_gate_up.shape[1:3])
    for e, weight in enumerate(w_gate_up):
        z = torch.where((expert == e)[:, None, None, None], torch.einsum("jvh,sih->jvsi", rows, weight), z)
    return z


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
    *,
    of_h: OfH = _as_it_is,
) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring; `of_h` as above."""
    dtype, acc = x.dtype, _acc(x)
    x, w_down = x.to(acc), w_down.to(acc)
    image, expert = _segments(topk_indices, plan)
    z = _up_segments(x, w_gate_up.to(acc), image, expert)
    weighted = of_h(_swiglu(z) * probs[image, expert][:, None, None])
    out = torch.zeros_like(x)
    for e, weight in enumerate(w_down):
        out = out.index_add(0, image, (weighted * (expert == e)[:, None, None]) @ weight)
    residual_scale, output_scale = scales
    y = (residual_scale * x + output_scale * out).to(dtype).contiguous()
    return y, z.to(dtype) if save_z else x.new_empty(0, dtype=dtype)


def expert_mlp_topk_bwd(
    grad: Tensor,
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    probs: Tensor,
    topk_indices: Tensor,
    expert_offsets: Tensor,
    plan: Tensor,
    z: Tensor,
    scales: Scales,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See the contract in the package docstring."""
    dtype, acc = x.dtype, _acc(x)
    residual_scale, output_scale = scales
    needs_x, needs_gate_up, needs_down, needs_probs = needs
    grad, x, w_gate_up, w_down = (t.to(acc) for t in (grad, x, w_gate_up, w_down))
    image, expert = _segments(topk_indices, plan)
    z = z.to(acc) if z.numel() else _up_segments(x, w_gate_up, image, expert)

    h, rows, grad_rows = _swiglu(z), x[image], grad[image]
    segment_probs = probs[image, expert][:, None, None]
    grad_h = torch.zeros_like(h)
    for e, weight in enumerate(w_down):
        mask = (expert == e)[:, None, None]
        grad_h = torch.where(mask, output_scale * (grad_rows @ weight.T), grad_h)
    grad_z, weighted = _swiglu_bwd(z, grad_h * segment_probs), output_scale * h * segment_probs

    grad_x, grad_gate_up, grad_down = residual_scale * grad, torch.zeros_like(w_gate_up), torch.zeros_like(w_down)
    for e, weight in enumerate(w_gate_up):
        mask = (expert == e)[:, None, None]
        own = grad_z * mask[..., None]
        grad_x = grad_x.index_add(0, image, torch.einsum("jvsi,sih->jvh", own, weight))
        grad_gate_up[e] = torch.einsum("jvsi,jvh->sih", own, rows)
        grad_down[e] = torch.einsum("jvi,jvh->ih", weighted * mask, grad_rows)
    none = x.new_empty(0, dtype=dtype)  # cloned for each use: outputs of an op must not alias
    grad_probs = torch.zeros_like(probs).index_put((image, expert), (h * grad_h).sum(dim=(1, 2)))
    return (
        grad_x.to(dtype) if needs_x else none.clone(),
        grad_gate_up.to(dtype) if needs_gate_up else none.clone(),
        grad_down.to(dtype) if needs_down else none.clone(),
        grad_probs if needs_probs else probs.new_empty(0),
    )
