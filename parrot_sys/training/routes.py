"""Routes of a training run: their numbers in its records, and a warning where they come to nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch.distributed as dist

from parrot_sys.routes import DEAD_BELOW, RouteSums, dead_experts, mutual_information

_PATIENCE = 10
"""Records that how experts are used is judged over, at least."""
_IMAGES_PER_EXPERT = 16
"""Images that it is judged over, at least, times the number of experts."""
_SLIGHT = 0.01
"""Entropies and information that differ by less than this part of their most are taken for equal."""
_REST = 0.1
"""An expert takes all where the others together have less."""
_CERTAIN = 3.0
"""I(expert; language) is judged when the limit is this many times that by chance."""
_EASING = 2.0
"""Factor on the limits that routes must be within to have recovered."""

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


@dataclass(slots=True)
class _Window:
    """Sums over the records since the last judgement."""

    sums: RouteSums = field(default_factory=RouteSums)
    records: int = 0

    def add(self, sums: RouteSums) -> None:
        self.sums.merge(sums, kinds=("language",))
        self.records += 1

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums.state_dict(), "records": self.records}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums.load_state_dict(state["sums"])
        self.records = state["records"]


class RouteWatch:
    """Warns once when routes come to nothing, and again after they have recovered.

    How experts are used is judged over windows of ten records with images, or more where these are few. What routes say
    of the language is judged over as many records as it takes to tell it from chance.
    """

    def __init__(self) -> None:
        self._usage, self._language = _Window(), _Window()
        self._said = {"usage": "", "language": ""}

    def judge(self, sums: RouteSums) -> list[str]:
        """The warnings that are due after a record of training.

        Args:
            sums: over the images of the record, of all ranks.
        """
        usage = sums.usage()
        if usage is None or len(usage.shares) < 2:
            return []
        self._usage.add(sums)
        self._language.add(sums)
        if self._usage.records < _PATIENCE or self._usage.sums.images < _IMAGES_PER_EXPERT * len(usage.shares):
            return []
        return [*self._judge_usage(), *self._judge_language()]

    def _judge_usage(self) -> list[str]:
        window, self._usage = self._usage, _Window()
        problems = _usage_problems(window.sums)
        if problems and problems[0] != "dead":  # then nothing is to be said of languages
            self._language = _Window()
        # (Near a limit a problem comes and goes: it has gone when routes are clearly better.)
        if self._said["usage"] in _usage_problems(window.sums, _EASING):
            return []
        self._said["usage"] = problems[0] if problems else ""
        return [_text(problem, window) for problem in problems[:1]]

    def _judge_language(self) -> list[str]:
        window = self._language
        says = _language_bits(window.sums)
        if says is None:
            return []
        self._language = _Window()
        before, (own, limit) = self._said["language"], says
        self._said["language"] = "nothing" if own < (limit * _EASING if before else limit) else ""
        return [_text("nothing", window)] if self._said["language"] and not before else []

    def state_dict(self) -> dict[str, Any]:
        """Plain values for `load_state_dict`."""
        windows = {"usage": self._usage.state_dict(), "language": self._language.state_dict()}
        return {"said": dict(self._said), "windows": windows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was."""
        if "said" not in state:  # of earlier versions, which saved a problem and for how many records it was there
            self._said["usage"] = state["problem"] if state["records"] >= _PATIENCE else ""
            return
        self._said = dict(state["said"])
        self._usage.load_state_dict(state["windows"]["usage"])
        self._language.load_state_dict(state["windows"]["language"])


def _usage_problems(sums: RouteSums, easing: float = 1.0) -> list[str]:
    """Problems in the use of the experts, the most telling first.

    Each language counts alike, with the images that have none as one more: in data that are nearly all English, the
    experts of other languages are used as they should be.

    Args:
        sums: over the images of a window.
        easing: factor on the limits; above 1 more is a problem.
    """
    usage, means = sums.usage(), sums.means("language")
    assert usage is not None, "windows have images"
    rows = np.stack(list(means.values()))
    even, slight = rows.mean(axis=0), easing * _SLIGHT * usage.most
    alike = mutual_information(rows) < slight
    found = {
        "uniform": alike and usage.most - usage.image_entropy < slight,
        "one": even.max() > 1 - easing * _REST,
        "same": alike and usage.entropy - usage.image_entropy < slight,
        "dead": 2 * len(dead_experts(even.tolist(), easing * DEAD_BELOW)) > len(even),
    }
    # (Images in one language may well have one route.)
    judged = ("uniform",) if len(rows) == 1 and "" not in means else tuple(found)
    return [problem for problem in judged if found[problem]]


def _language_bits(sums: RouteSums) -> tuple[float, float] | None:
    """I(expert; language) beyond chance, and the limit below which it is nothing; None with too few images to tell."""
    found, usage = sums.information("language"), sums.usage()
    if found is None or usage is None:
        return None
    limit = _SLIGHT * min(found.most, usage.entropy - usage.image_entropy)
    return (found.bits - found.by_chance, limit) if _CERTAIN * found.by_chance < limit else None


def _text(problem: str, window: _Window) -> str:
    usage, information, means = window.sums.usage(), window.sums.information("language"), window.sums.means("language")
    assert usage is not None, "windows have images"
    even = np.stack(list(means.values())).mean(axis=0)
    of = "" if len(means) == 1 else " (mean over languages)"
    images = f"H(expert) {usage.entropy:.4f} bits, of an image {usage.image_entropy:.4f} bits"
    what = {
        "uniform": f"routes are uniform (entropy of an image's weights: {usage.image_entropy:.4f} of {usage.most:.4f} "
        "bits): experts act as one",
        "one": f"expert {even.argmax() + 1} of {len(even)} takes {even.max():.0%} of all images{of}",
        "same": f"routes are the same for all images ({images}): experts act as one",
        "dead": f"{len(dead_experts(even.tolist()))} of {len(even)} experts are dead{of}",
        "nothing": f"routes say nothing of the language ({images})",
    }[problem]
    if information is not None:
        what += f", I(expert; language) is {information.bits:.4f} bits ({information.by_chance:.4f} by chance)"
    return f"{what}; so it was over the last {window.records} records. docs/routing.md says what helps"
