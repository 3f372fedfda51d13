"""Images that the ranks of one pipeline stage have read in parts, and how each rank finds its part."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import ProcessGroup

from parrot_sys.data.batch import PackedBatch
from parrot_sys.data.image_share import Failure, ImageShare
from parrot_sys.parallel import all_gather_rows


def image_share() -> ImageShare:
    """The place of this rank among those that have the same samples; every rank calls this."""
    members: dict[int, list[int]] = {}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, parallel_state.get_data_parallel_rank())
    for rank, samples in enumerate(everyone):
        members.setdefault(samples, []).append(rank)
    if all(len(ranks) == 1 for ranks in members.values()):
        return ImageShare()
    # Messages about pictures cross while the device works: over gloo, in a group of their own.
    groups = {samples: dist.new_group(ranks, backend="gloo") for samples, ranks in sorted(members.items())}
    group = groups[parallel_state.get_data_parallel_rank()]

    def agree(failures: list[Failure]) -> list[Failure]:
        count = torch.tensor(len(failures))
        dist.all_reduce(count, group=group)
        if not count:
            return []
        lists: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(lists, failures, group=group)
        return [failure for each in lists for failure in each]

    return ImageShare(
        needed=parallel_state.get_pipeline_model_parallel_rank() == 0,
        context=(parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()),
        tensor=(
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
        ),
        agree=agree,
    )


@torch.no_grad()
def gather_images(batch: PackedBatch, group: ProcessGroup) -> PackedBatch:
    """The batch with all images of this context-parallel rank, of which each tensor-parallel rank has read a part.

    Args:
        batch: on the device of the model.
        group: tensor-parallel group.
    """
    counts = batch.dealt_images
    if counts is None or not sum(counts):
        return batch if counts is None else dataclasses.replace(batch, dealt_images=None)
    joined: dict[str, Any] = {"dealt_images": None}
    for name in ("pixel_values", "image_features"):
        if (images := getattr(batch, name)) is not None:
            joined[name] = images if group.size() == 1 else all_gather_rows(images, counts, group)
    return dataclasses.replace(batch, **joined)
