"""Which expert runs on which image, laid out for the kernels of `expert_mlp`: one small launch, of either form."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

# n images, V rows an image, E experts, K topk, J segments: at most n * K, or E * n (dense)


class Route(NamedTuple):
    """By segment: chosen pairs in the order of the plan, or E times all images (dense)."""

    probs: Tensor
    """[n, E] float32."""
    scale: float
    """Factor of `probs`."""
    topk: int
    weights: Tensor | None = None
    """[J] float32, `scale` times the weight of each segment; None where the kernels look at `probs` themselves."""
    offsets: Tensor | None = None
    """[E + 1]; None in the dense form, as all that follow."""
    plan: Tensor | None = None
    """[J]"""
    places: Tensor | None = None
    """[n * K], the inverse of the plan; -1 at positions that it lacks."""
    experts: Tensor | None = None
    """[n, K]"""


@functools.cache
def _kernels() -> ModuleType:
    """The Triton kernels, imported late: the CUDA back end has to import without Triton, to say what it lacks."""
    from parrot_kernels.expert_mlp import kernels

    return kernels


def _lay_out(route: Route, segments: int) -> Route:
    if segments and (route.plan is not None or route.weights is not None):
        images, num_experts = route.probs.shape
        own = _kernels().layout_launch(segments, images, route.topk, num_experts, route.scale)
        own(route.plan, route.experts, route.probs, route.places, route.weights)
    return route


def dense_route(probs: Tensor, scale: float, *, weighted: bool = False) -> Route:
    """Every expert for all images; with `weighted` the weights of the segments."""
    weights = probs.new_empty(probs.numel()) if weighted else None
    return _lay_out(Route(probs=probs, scale=scale, weights=weights, topk=probs.shape[1]), probs.numel())


def topk_route(
    probs: Tensor, topk_indices: Tensor, offsets: Tensor, plan: Tensor, scale: float, *, weighted: bool = False
) -> Route:
    """The pairs of the plan; with `weighted` the weights of the segments."""
    segments = plan.shape[0]
    places = plan.new_empty(topk_indices.numel())
    if segments < len(places):
        places.fill_(-1)
    weights = probs.new_empty(segments) if weighted else None
    route = Route(
        probs=probs, scale=scale, weights=weights, offsets=offsets, plan=plan, places=places, experts=topk_indices,
        topk=topk_indices.shape[1],
    )  # fmt: skip
    return _lay_out(route, segments)


def grad_probs(sums: Tensor, route: Route) -> Tensor:
    """Gradient of probs [n, E] from sums [B, J, V] over B and V."""
    grad = torch.empty_like(route.probs)
    blocks, segments, rows = sums.shape
    if grad.numel():
        images, num_experts = route.probs.shape
        own = _kernels().grad_probs_launch(images, segments, rows, blocks, route.topk, num_experts, route.scale)
        own(sums, route.places, route.experts, grad)
    return grad
