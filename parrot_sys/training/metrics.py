"""Metrics of a step: sums that every rank adds up and one reduction turns into means; and the work a step takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parrot_sys.data.batch import PackedBatch
from parrot_sys.data.languages import OTHER, canonical, in_order
from parrot_sys.modules.text_guided_moe import RoutingOutput
from parrot_sys.routes import RouteSums
from parrot_sys.training.routes import DESCRIPTIONS, gather_routes, route_record

# A languages (with "other"), E experts

_SCALARS = ("loss", "aux_loss", "labels", "rows", "samples", "images", "flops", "stop")

PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "H800": 989.0, "A100": 312.0, "A800": 312.0, "L40S": 362.0}
"""Dense bf16 peak by a part of the device's name (NVIDIA data sheets)."""


class StepMetrics:
    """Sums over micro-batches; `reduce` adds those of the other ranks. One vector, so one message a step.

    All sums live in one float64 vector: scalars, then per language loss, labels and images, then per language and
    expert probabilities and rows. Numbers that the host knows wait there until `reduce`: one copy to a GPU. The labels
    of `routes` are any texts, so that each rank keeps its own until a record is due.
    """

    def __init__(self, num_experts: int, device: torch.device | str = "cpu", *, languages: Sequence[str]) -> None:
        """
        Args:
            num_experts: E.
            device: of the sums.
            languages: codes that are counted apart, the same on all ranks; samples in others are `other`.
        """
        self.num_experts = num_experts
        self.steps = 0
        self.languages = (*languages, OTHER)
        self._index = {name: index for index, name in enumerate(self.languages)}
        count = len(self.languages)
        self.sums = torch.zeros(len(_SCALARS) + count * (3 + 2 * num_experts), dtype=torch.float64, device=device)
        parts = self.sums.split([len(_SCALARS), count * 3, count * num_experts, count * num_experts])
        self._host = dict.fromkeys(_SCALARS, 0.0)
        self._scalars = parts[0]
        self._languages = parts[1].view(count, 3)  # loss, labels, images
        self._probabilities = parts[2].view(count, num_experts)  # sum over images
        self._rows = parts[3].view(count, num_experts)  # visual rows that each expert worked on
        self.routes = RouteSums()
        """Routes of the images of this rank."""
        self._weights: list[tuple[Tensor, dict[str, list[str]]]] = []

    def count(self, **values: float) -> None:
        """Adds numbers to scalars: labels, rows, samples, images, flops, stop."""
        for name, value in values.items():
            self._host[name] += value

    def scalar(self, name: str) -> float:
        """A sum, after `reduce`."""
        return self._scalars[_SCALARS.index(name)].item()

    @torch.no_grad()
    def add_losses(self, batch: PackedBatch, losses: Tensor) -> None:
        """Adds one micro-batch and the float32 [L] losses of its label rows; where the losses are, last stages."""
        samples = self._sample_languages(batch, losses.device)
        losses = losses.detach().double()
        self._scalars[0] += losses.sum()
        self.count(labels=batch.label_rows.numel(), images=batch.num_images)
        # Of context-parallel ranks, which have labels and images of their own, one counts what they share.
        if batch.context is None or batch.context.rank == 0:
            self.count(rows=batch.num_rows, samples=batch.num_samples)
        if losses.numel():
            owner = torch.searchsorted(batch.cu_seqlens, batch.label_rows, right=True) - 1
            pairs = torch.stack((losses, torch.ones_like(losses)), dim=1)
            self._languages[:, :2].index_add_(0, samples[owner], pairs)
        if batch.num_images:
            images = samples[batch.image_sample]
            self._languages[:, 2].index_add_(0, images, torch.ones_like(images, dtype=torch.float64))

    @torch.no_grad()
    def add_aux_loss(self, value: Tensor) -> None:
        """Adds a share of the auxiliary losses, 0-d."""
        self._scalars[1] += value

    @torch.no_grad()
    def add_routes(self, batch: PackedBatch, routing: RoutingOutput, num_visual_rows: int) -> None:
        """Adds the routes of a micro-batch's images; where the MoE is, on first stages."""
        if batch.num_images:
            self._weights.append((routing.probs.detach(), _image_labels(batch)))
        images = self._sample_languages(batch, routing.probs.device)[batch.image_sample]
        probs = routing.probs.detach().double()
        self._probabilities.index_add_(0, images, probs)
        chosen = torch.ones_like(probs)
        if routing.topk_indices is not None:
            chosen = torch.zeros_like(probs).scatter_(1, routing.topk_indices, 1.0)
        self._rows.index_add_(0, images, chosen * num_visual_rows)

    def reduce(self, *, contribute: bool = True) -> None:
        """Adds the sums of all ranks.

        Args:
            contribute: False on ranks whose samples another rank reports (tensor parallel); they may still ask to stop.
        """
        if not contribute:
            self.sums.zero_()
            self._host = dict.fromkeys(_SCALARS, 0.0) | {"stop": self._host["stop"]}
            self._weights = []
        self._scalars += torch.tensor(list(self._host.values()), dtype=torch.float64).to(self.sums.device)
        self._host = dict.fromkeys(_SCALARS, 0.0)
        dist.all_reduce(self.sums)
        for weights, labels in self._weights:
            self.routes.add(weights.cpu().numpy(), labels)
        self._weights = []
        self.steps = 1

    def merge(self, other: StepMetrics) -> None:
        """Adds the sums of other steps."""
        self.sums += other.sums
        self.routes.merge(other.routes)
        self.steps += other.steps

    @property
    def loss(self) -> float | None:
        """Mean loss of all labels, without auxiliary losses; None when there was no label."""
        labels = self.scalar("labels")
        return self.scalar("loss") / labels if labels else None

    def state_dict(self) -> dict[str, Any]:
        """The sums with their names, as plain values for `load_state_dict`; equal on all ranks, which all call this."""
        parts = (self._languages.tolist(), self._probabilities.tolist(), self._rows.tolist())
        languages = {
            name: list(sums) for name, *sums in zip(self.languages, *parts, strict=True) if any(map(any, sums))
        }
        return {
            "steps": self.steps,
            "scalars": dict(zip(_SCALARS, self._scalars.tolist(), strict=True)),
            "languages": languages,
            "routes": gather_routes(self.routes).state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on adding to the sums of `state`."""
        self.steps = state["steps"]
        self.sums.zero_()
        self._scalars.copy_(torch.tensor([state["scalars"].get(name, 0.0) for name in _SCALARS], dtype=torch.float64))
        for name, sums in state["languages"].items():
            for part, values in zip((self._languages, self._probabilities, self._rows), sums, strict=True):
                # (A language that the data had before a restart, and have no more, is one of the others.)
                part[self._index.get(name, -1)] += torch.tensor(values, dtype=torch.float64)
        # Those of all ranks: one goes on with them. (Earlier versions saved none.)
        if dist.get_rank() == 0 and "routes" in state:
            self.routes.load_state_dict(state["routes"])

    def record(self, routes: RouteSums | None = None) -> dict[str, Any]:
        """Means and counts with plain names, for JSON; all ranks call this together.

        `loss` (None without a label), `loss/zh`, `experts/zh/probability` (mean over images, one number an expert),
        `experts/zh/rows`, counts, and `batches`, the global batches that all of these are over. `describe` has a
        sentence on each.

        Args:
            routes: those of all ranks, where they have been gathered already.
        """
        result: dict[str, Any] = {"loss": self.loss}
        if aux_loss := self.scalar("aux_loss"):
            result["aux_loss"] = aux_loss / self.steps
        result |= {name: int(self.scalar(name)) for name in ("labels", "rows", "samples", "images")}
        result["batches"] = self.steps
        sums, probabilities, rows = (part.tolist() for part in (self._languages, self._probabilities, self._rows))
        for index, name in enumerate(self.languages):
            loss, labels, images = sums[index]
            if labels:
                result[f"loss/{name}"] = loss / labels
            if images and any(rows[index]):
                result[f"experts/{name}/probability"] = [p / images for p in probabilities[index]]
                result[f"experts/{name}/rows"] = [int(r) for r in rows[index]]
        return result | route_record(gather_routes(self.routes) if routes is None else routes)

    def _sample_languages(self, batch: PackedBatch, device: torch.device) -> Tensor:
        """int64 [S], index of each sample's language."""
        other = self._index[OTHER]
        names: Sequence[str] = batch.languages or [OTHER] * batch.num_samples
        return torch.tensor([self._index.get(name, other) for name in names], dtype=torch.int64, device=device)

    def is_finite(self) -> bool:
        """Whether every sum is a number: one NaN loss anywhere makes a sum NaN."""
        return math.isfinite(self.sums.sum().item())


_OVER = {
    "train": "the steps since the last record (logging.interval of them)",
    "validation": "the held-out records that a validation reads (at most validation.batches global batches)",
    "summary": "this start of the run",
}
"""Kind of a record -> what its means and sums are over, always on all processes and in all micro-batches."""
_DESCRIPTIONS = {
    "loss": "Mean loss of a label in nats, without auxiliary losses, over all labels of {over}. A label is a token "
    "that is learned. loss_reduction changes what is optimised, never this mean",
    "loss/*": "Mean loss of a label in nats over the labels in this language of {over}",
    "aux_loss": "Auxiliary losses of the router, mean over {over}",
    "experts/*/probability": "Mean probability of this expert over the images of samples in this language, over {over}",
    "experts/*/rows": "Visual rows of samples in this language that this expert worked on, sum over {over}",
    **DESCRIPTIONS,
    "labels": "Labels, sum over {over}",
    "rows": "Rows of text and images, sum over {over}",
    "samples": "Samples, sum over {over}",
    "images": "Images, sum over {over}",
    "batches": "Global batches that the record is over",
    "skipped_steps": "Steps whose update was left out, sum over {over}",
    "grad_norm": "Norm of the gradient before clipping, of the last step alone",
    "lr": "Learning rate of the last step",
    "lr/*": "Learning rate of this part in the last step",
    "epoch": "Epoch of the last step",
    "seconds": "Seconds that {over} took",
    "tokens_per_second": "Rows of text and images a second, over {over}",
    "summary/loss": "Loss of the last record of training: mean loss of a label in nats over all labels of its steps",
    "summary/labels": "Labels that this loss is the mean over",
    "steps": "Steps of {over}",
    "finished": "1 where the run has reached its last step",
    "mfu": "Share of the devices' peak of dense bf16 operations, over {over}",
}


def describe(kind: str, name: str) -> str:
    """A sentence on a number of a record: what it is, and the mean or sum of what. Empty for a number without one.

    Args:
        kind: of the record: `train`, `validation` or `summary`.
        name: of the number, such as `loss/zh`.
    """
    first, *middle = name.split("/")
    general = "/".join([first, *(["*"] if middle else []), *middle[1:]])
    names = (f"{kind}/{general}", general, name)
    text = next((_DESCRIPTIONS[each] for each in names if each in _DESCRIPTIONS), "")
    return text.format(over=_OVER.get(kind, "the run"))


def _image_labels(batch: PackedBatch) -> dict[str, list[str]]:
    """Kind of label -> that of each image, empty where it is not known."""
    owners = batch.image_sample.tolist()
    kinds = {"language": batch.languages, "category": batch.categories}
    return {kind: [values[owner] for owner in owners] for kind, values in kinds.items() if values}


def counted_languages(stated: Iterable[str]) -> tuple[str, ...]:
    """Languages that metrics count apart, of those that records state: all that are codes, in the order of reports."""
    return tuple(in_order(language for language in stated if canonical(language) == language))


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a known GPU in FLOP/s; None where it is unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for part, tflops in PEAK_TFLOPS.items() if part in name), None)
