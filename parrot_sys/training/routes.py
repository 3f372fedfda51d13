"""Routes of a training run: their numbers in its records, and a warning where they come to nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from parrot_sys.routes import RouteSums

_PATIENCE = 10
"""Records in a row that show a problem before it is said."""
_UNIFORM = 0.99
"""Routes are uniform where the mean entropy of an image's shares is above this part of that of equal shares."""
_ALL = 0.9
"""An expert takes all where its mean share is above this."""

DESCRIPTIONS = {
    "routes/language_bits": "Information I(expert; language) in bits between the expert that an image's routing "
    "weights would draw and the language of its sample, over the images of {over}",
    "routes/language_bits_by_chance": "Mean of I(expert; language) when the languages are permuted over the images of "
    "{over}: what routes show that say nothing about the language",
    "routes/category_bits": "The same with the category that the records state for their images, over {over}",
    "routes/category_bits_by_chance": "Mean of I(expert; category) when the categories are permuted over the images "
    "of {over}",
    "routes/entropy_bits": "Entropy H(expert) in bits of the experts' mean shares over the images of {over}; log2 of "
    "the number of experts where all are used alike, 0 where one takes all",
    "routes/image_entropy_bits": "Mean entropy in bits of an image's own shares over {over}; log2 of the number of "
    "experts where routes are uniform, 0 where each image has one expert",
    "routes/shares": "Mean share of this expert in the routing weights of an image, over the images of {over}",
    "routes/dead_experts": "Experts with less than a tenth of an equal share, over the images of {over}",
}


def gather_routes(sums: RouteSums) -> RouteSums:
    """The sums of all ranks, which all call this."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return sums
    states: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(states, sums.state_dict())
    total = RouteSums()
    for state in states:
        each = RouteSums()
        each.load_state_dict(state)
        total.merge(each)
    return total


def route_record(sums: RouteSums) -> dict[str, Any]:
    """Numbers of a record, with the names of `DESCRIPTIONS`; none without routed images."""
    usage = sums.usage()
    if usage is None:
        return {}
    record: dict[str, Any] = {}
    for kind in sums.kinds:
        if (found := sums.information(kind)) is not None:
            record |= {f"routes/{kind}_bits": found.bits, f"routes/{kind}_bits_by_chance": found.by_chance}
    return record | {
        "routes/entropy_bits": usage.entropy,
        "routes/image_entropy_bits": usage.image_entropy,
        "routes/shares": list(usage.shares),
        "routes/dead_experts": len(usage.dead),
    }


class RouteWatch:
    """Warns once when routes stay uniform or one expert takes all, and again after they have recovered."""

    def __init__(self) -> None:
        self._problem, self._records = "", 0

    def judge(self, record: Mapping[str, Any]) -> str:
        """The warning that is due after a record of training; empty where none is."""
        shares = record.get("routes/shares", ())
        if len(shares) < 2:
            return ""
        problem = _problem(record)
        self._records = self._records + 1 if problem == self._problem else 1
        self._problem = problem
        return _text(problem, record) if problem and self._records == _PATIENCE else ""

    def state_dict(self) -> dict[str, Any]:
        """Plain values for `load_state_dict`."""
        return {"problem": self._problem, "records": self._records}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was."""
        self._problem, self._records = state["problem"], state["records"]


def _problem(record: Mapping[str, Any]) -> str:
    shares = record["routes/shares"]
    if record["routes/image_entropy_bits"] > _UNIFORM * math.log2(len(shares)):
        return "uniform"
    return "one" if max(shares) > _ALL else ""


def _text(problem: str, record: Mapping[str, Any]) -> str:
    shares, bits = record["routes/shares"], record.get("routes/language_bits")
    told = "" if bits is None else f", I(expert; language) is {bits:.4f} bits"
    if problem == "uniform":
        own, most = record["routes/image_entropy_bits"], math.log2(len(shares))
        what = f"routes are uniform (entropy of an image's weights: {own:.4f} of {most:.4f} bits): experts act as one"
    else:
        what = f"expert {shares.index(max(shares)) + 1} of {len(shares)} takes {max(shares):.0%} of all images"
    return f"{what}{told}; so it was in the last {_PATIENCE} records. docs/routing.md says what helps"
