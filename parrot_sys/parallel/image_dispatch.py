"""Brings whole images to the ranks that hold their experts, and the experts' outputs back (expert parallelism).

n images of this rank, R images that reach it, V visual rows an image, H hidden_size, E experts of which this rank holds
`local` consecutive ones, K topk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from parrot_sys.errors import ConfigError
from parrot_sys.ops import ExpertPlan, TopKRouting, permute, unpermute
from parrot_sys.parallel.collectives import (
    all_gather_rows,
    all_gather_single,
    all_to_all_rows,
    copy_to_group,
    gather_from_group,
    reduce_from_group,
    reduce_scatter_rows,
    split_to_group,
)

# Weights of experts are never negative: this one says that an image did not choose the expert.
_NOT_CHOSEN = -1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertGroups:
    """The ranks that hold the experts together; None stands for a group of one rank."""

    tp: ProcessGroup | None = None
    """Ranks that are given the same images and whose results all go on alike (tensor parallel)."""
    ep: ProcessGroup | None = None
    """Rank r holds the experts [r * E / size, (r + 1) * E / size)."""
    etp: ProcessGroup | None = None
    """Ranks that share each expert: rank r holds the r-th part of its inner columns."""
    joint: ProcessGroup | None = None
    """Ranks of `ep` x `etp`: number (rank in ep) * (size of etp) + rank in etp."""

    @property
    def ep_rank(self) -> int:
        """This rank's number in `ep`."""
        return self.ep.rank() if self.ep else 0

    @property
    def ep_size(self) -> int:
        """Ranks that share the experts."""
        return self.ep.size() if self.ep else 1

    @property
    def etp_rank(self) -> int:
        """This rank's number in `etp`."""
        return self.etp.rank() if self.etp else 0

    @property
    def etp_size(self) -> int:
        """Ranks that share each expert."""
        return self.etp.size() if self.etp else 1

    @property
    def same_images(self) -> bool:
        """Whether all ranks that share the experts are given the same images: nothing has to be sent to them then."""
        if self.joint is None or self.tp is None:
            return self.joint is self.tp
        return set(dist.get_process_group_ranks(self.joint)) == set(dist.get_process_group_ranks(self.tp))


def check_experts(num_experts: int, ffn_hidden_size: int, ep_size: int, etp_size: int, *, section: str = "moe") -> None:
    """
    Args:
        num_experts: all of them.
        ffn_hidden_size: inner width of one.
        ep_size: ranks that share the experts.
        etp_size: ranks that share each expert.
        section: of the configuration, for the message.

    Raises:
        ConfigError: the experts cannot be shared by so many ranks; names the nearest numbers that fit.
    """
    for name, size, option, parts in (
        ("num_experts", num_experts, "expert_model", ep_size),
        ("ffn_hidden_size", ffn_hidden_size, "expert_tensor", etp_size),
    ):
        if size % parts:
            fits = min((p for p in range(1, size + 1) if size % p == 0), key=lambda p: (abs(p - parts), p))
            below, above = size // parts * parts, (size // parts + 1) * parts
            near = f"{below} or {above}" if below else f"{above}"
            raise ConfigError(
                f"{section}.{name} must be a multiple of parallel.{option}_parallel_size={parts}, got {size}: "
                f"set {section}.{name} to {near}, or parallel.{option}_parallel_size to {fits}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Dispatch(ABC):
    """Images that the local experts work on; `combine` takes their partial sums home."""

    images: Tensor  # [R, V, H]
    probs: Tensor  # [R, local], weights of the local experts; columns cut over `etp` give partial gradients
    plan: TopKRouting | ExpertPlan | None  # None: every local expert runs on every image
    home: Tensor  # [m, V, H], images whose sums `combine` returns before it gathers them
    groups: ExpertGroups
    num_images: int  # n

    @abstractmethod
    def _sums(self, output: Tensor) -> Tensor:
        """[R, V, H] -> [m, V, H], summed over the ranks that share the experts."""

    def combine(self, output: Tensor, *, residual_scale: float) -> Tensor:
        """`residual_scale * images + sum over all experts`, [n, V, H], the same on every rank of `tp`.

        Args:
            output: [R, V, H], sum over the local experts and inner columns, for each image of this dispatch.
            residual_scale: factor of the images themselves.
        """
        total = self._sums(output)
        if residual_scale:
            total = torch.add(total, self.home, alpha=residual_scale)
        return total if self.groups.same_images else gather_from_group(total, self.num_images, self.groups.tp)


class _InPlace(Dispatch):
    """All ranks have the images: each runs its own experts and columns on all of them."""

    __slots__ = ()

    def _sums(self, output: Tensor) -> Tensor:
        return reduce_from_group(output, self.groups.joint)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Gathered(Dispatch):
    """Every image goes to every rank of `joint`."""

    counts: Sequence[int]  # images of each rank of `joint`

    def _sums(self, output: Tensor) -> Tensor:
        return reduce_scatter_rows(output, self.counts, self.groups.joint)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Exchanged(Dispatch):
    """An image goes once to each rank of `ep` that holds an expert it chose, and from there over `etp`."""

    plan_to_send: Tensor  # positions image * (size of ep) + rank, by rank
    send: Sequence[int]  # images for each rank of `ep`
    receive: Sequence[int]  # images of each rank of `ep`
    arrived: Sequence[int]  # images that each rank of `etp` received

    def _sums(self, output: Tensor) -> Tensor:
        groups = self.groups
        output = reduce_scatter_rows(output, self.arrived, groups.etp)
        returned = all_to_all_rows(output, self.receive, self.send, groups.ep)
        return unpermute(returned, self.plan_to_send, topk=groups.ep_size, num_rows=len(self.home))


def dispatch_images(images: Tensor, probs: Tensor, routing: TopKRouting | None, groups: ExpertGroups) -> Dispatch:
    """Send images and their weights to the ranks that hold the experts; every rank of the groups takes part.

    Ranks of `tp` first split the images among themselves, unless they are the ones that share the experts. The host
    reads one small tensor of counts when images of other ranks may come, or when only some of the experts are here.

    Args:
        images: [n, V, H], n may be 0 and differ between ranks that are not in one `tp`.
        probs: [n, E], the weight of each expert.
        routing: which experts each image chose; None for all.
        groups: where the experts are.
    """
    chosen = None
    if routing is not None:
        chosen = torch.zeros_like(probs, dtype=torch.bool).scatter(1, routing.topk_indices, True)
    num_images = len(images)
    if groups.same_images:
        return _in_place(images, probs, chosen, routing, groups)
    images, probs = split_to_group(images, groups.tp), split_to_group(probs, groups.tp)
    if chosen is None or routing is None:
        return _gather(images, probs, None, num_images, groups)
    topk = routing.topk_indices.shape[1]
    marked = probs.where(split_to_group(chosen, groups.tp), _NOT_CHOSEN)
    if groups.ep is None:
        return _gather(images, marked, topk, num_images, groups)
    return _exchange(images, marked, topk, num_images, groups)


def _in_place(
    images: Tensor, probs: Tensor, chosen: Tensor | None, routing: TopKRouting | None, groups: ExpertGroups
) -> Dispatch:
    plan: TopKRouting | ExpertPlan | None = routing
    if chosen is not None and routing is not None and groups.ep is not None:
        chosen = _local(chosen, groups)
        plan = _plan(chosen, int(chosen.sum()), routing.topk_indices.shape[1])
    return _InPlace(
        images=copy_to_group(images, groups.joint),
        probs=_local(copy_to_group(probs, groups.joint), groups),
        plan=plan,
        home=images,
        groups=groups,
        num_images=len(images),
    )


def _gather(images: Tensor, probs: Tensor, topk: int | None, num_images: int, groups: ExpertGroups) -> Dispatch:
    counts = [len(images)]
    if groups.joint is not None:
        counts = [count for (count,) in _gather_counts([len(images)], probs.device, groups.joint)]
    everyone = all_gather_rows(probs, counts, groups.joint)
    plan = None
    if topk is not None:
        plan = _plan(everyone.detach() != _NOT_CHOSEN, len(everyone) * topk, topk)
    return _Gathered(
        images=all_gather_rows(images, counts, groups.joint),
        probs=_local(everyone, groups),
        plan=plan,
        home=images,
        groups=groups,
        num_images=num_images,
        counts=counts,
    )


def _exchange(images: Tensor, probs: Tensor, topk: int, num_images: int, groups: ExpertGroups) -> Dispatch:
    assert groups.joint is not None, "images are exchanged within this group"
    ep, etp = groups.ep_size, groups.etp_size
    choices = (probs.detach() != _NOT_CHOSEN).unflatten(1, (ep, -1))  # [n, ep, local]
    wanted = choices.any(2)  # [n, ep]
    # The one copy to the host: for each rank how many images go there, and how many (image, expert) pairs they make.
    counts = _gather_counts(torch.cat((wanted.sum(0), choices.sum((0, 2)))), probs.device, groups.joint)
    send = counts[groups.ep_rank * etp + groups.etp_rank][:ep]
    to_here = [count[groups.ep_rank] for count in counts]
    pairs = sum(count[ep + groups.ep_rank] for count in counts)
    receive = to_here[groups.etp_rank :: etp]
    arrived = [sum(to_here[rank::etp]) for rank in range(etp)]
    # Positions rank * n + image of what is sent, first; then as `permute` counts them.
    places = wanted.T.flatten().byte().argsort(descending=True, stable=True)[: sum(send)]
    plan_to_send = places % max(len(images), 1) * ep + places // max(len(images), 1)

    def bring(rows: Tensor) -> Tensor:
        rows, _ = permute(rows, plan_to_send, topk=ep)
        return all_gather_rows(all_to_all_rows(rows, send, receive, groups.ep), arrived, groups.etp)

    arriving = _local(bring(probs), groups)
    return _Exchanged(
        images=bring(images),
        probs=arriving,
        plan=_plan(arriving.detach() != _NOT_CHOSEN, pairs, topk),
        home=images,
        groups=groups,
        num_images=num_images,
        plan_to_send=plan_to_send,
        send=send,
        receive=receive,
        arrived=arrived,
    )


def _local(columns: Tensor, groups: ExpertGroups) -> Tensor:
    """[R, E] -> [R, local]."""
    return columns.chunk(groups.ep_size, dim=1)[groups.ep_rank]


def _plan(chosen: Tensor, pairs: int, topk: int) -> ExpertPlan:
    """Plan of the `pairs` chosen pairs in [R, local] bool, none of whose rows has more than `topk`."""
    num_experts = chosen.shape[1]
    indices = chosen.byte().argsort(dim=1, descending=True, stable=True)[:, : min(topk, num_experts)]
    experts = indices.where(chosen.gather(1, indices), num_experts)  # slots without an expert come last
    offsets = torch.cat((chosen.new_zeros(1, dtype=torch.int32), chosen.sum(0).cumsum(0).int()))
    plan = experts.flatten().argsort(stable=True)[:pairs]
    return ExpertPlan(topk_indices=indices, expert_offsets=offsets, plan=plan)


def _gather_counts(values: Tensor | list[int], device: torch.device, group: ProcessGroup) -> list[list[int]]:
    """The integers of every rank, on the host."""
    own = torch.as_tensor(values, dtype=torch.int64, device=device)
    everyone = own.new_empty(group.size() * len(own))
    all_gather_single(everyone, own, group=group)
    counts: list[list[int]] = everyone.view(group.size(), -1).tolist()
    return counts
