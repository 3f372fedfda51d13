"""Sizes of the messages of `parrot_sys.parallel.dispatch_images`, which takes images to experts.

E experts, e ranks that share them (EP), m ranks that share each (ETP), t tensor-parallel ranks, K chosen experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.systems.balance import ranks_of_choices

if TYPE_CHECKING:
    from parrot_sys.systems.layout import Layout

Way = Literal["local", "in_place", "gathered", "exchanged"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Dispatch:
    """Images of a micro-batch on their way, for a rank of the first pipeline stage; routes are taken for balanced."""

    way: Way
    images: float  # of this rank, the same on all t ranks
    own: float  # those that this rank sends: split over the t ranks where these do not share the experts
    sent: float  # copies of them, one for each rank that wants it
    arriving: float  # that the experts of this rank work on
    worth: float  # work and up-projections of this rank, in images that go through all their experts here

    @staticmethod
    def of(moe: TextGuidedMoEConfig, layout: Layout, images: float) -> Dispatch:
        """For `images` of this rank (after context parallelism)."""
        tensor, ranks = layout.tensor, layout.expert * layout.expert_tensor
        if tensor == ranks:
            way: Way = "local" if tensor == 1 else "in_place"
            return Dispatch(way=way, images=images, own=images, sent=0, arriving=images, worth=images / tensor)
        own = images if tensor == 1 else math.ceil(images / tensor)
        if moe.routing == "dense" or layout.expert == 1:
            return Dispatch(way="gathered", images=images, own=own, sent=own, arriving=own * ranks, worth=own)
        sent = own * ranks_of_choices(moe.num_experts, layout.expert, moe.topk)
        arriving = sent * layout.expert_tensor
        return Dispatch(way="exchanged", images=images, own=own, sent=sent, arriving=arriving, worth=own)
