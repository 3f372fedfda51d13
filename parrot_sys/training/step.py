"""One training step: the loss over the global batch, its gradients, the update, and what the step reports."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parrot_sys.data.batch import PackedBatch
from parrot_sys.megatron.image_gather import gather_images
from parrot_sys.megatron.runtime.optimizer import (
    data_parallel_group,
    gradient_norm,
    replica_group,
    tensor_parallel_rank,
)
from parrot_sys.megatron.runtime.schedules import forward_backward, optimizer_step
from parrot_sys.modules.text_guided_moe import RoutingOutput
from parrot_sys.systems.flops import FlopCounter
from parrot_sys.training.faults import BadStep, StepGuard
from parrot_sys.training.metrics import StepMetrics


@dataclass(frozen=True, slots=True)
class StepResult:
    """Results of a step."""

    metrics: StepMetrics  # summed over all ranks
    grad_norm: float
    skipped: bool = False  # nothing was updated: loss or gradient are bad


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRunner:
    """Runs steps of one model; `optimizer` and `flops` are not needed for validation."""

    chunks: Sequence[Any]
    """From `wrap_data_parallel`."""
    device: torch.device
    num_experts: int
    num_visual_rows: int
    languages: Sequence[str]
    """Codes that metrics count apart, the same on all ranks."""
    reduction: Literal["global", "micro_batch"] = "global"
    optimizer: Any = None
    flops: FlopCounter | None = None
    guard: StepGuard = field(default_factory=StepGuard)

    def train(self, batches: Sequence[PackedBatch], step: int, *, stop: bool = False) -> StepResult:
        """Forward, backward, clip, update.

        Args:
            batches: micro-batches of this rank, the same on those that share them (tensor and context parallel); as
                many on every rank, some may be empty.
            step: number of the step, for messages.
            stop: this rank wants to end; any rank's wish shows in `metrics.scalar("stop")` on all of them.

        Raises:
            TrainingError: the loss or the gradient is no number or spikes, on every rank, and `guard` says stop, or
                too many steps had to be left out; the message names step and records. Nothing has been updated.
        """
        model = self.chunks[0].module  # what routes images is in the first part
        model.start_step(step - 1)
        metrics = self._run(batches, backward=True, stop=stop)
        grad_norm, guilty = math.nan, []
        bad: BadStep | None
        if not metrics.is_finite():
            guilty = self._guilty(batches)
            message = "the loss is not finite" + (f" for {len(guilty)} records" if guilty else "")
            bad = BadStep(step=step, reason="loss is no number", message=message, loss=metrics.loss)
        elif (loss := metrics.loss) is None:
            message = f"not one of its {metrics.scalar('samples'):.0f} samples has a label"
            bad = BadStep(step=step, reason="no labels", message=message, loss=None)
        else:
            grad_norm = gradient_norm(self.optimizer)
            bad = self.guard.judge(step, loss, grad_norm, self.device)
        model.finish_step(updated=bad is None)
        if bad is None:
            optimizer_step(self.optimizer)
            return StepResult(metrics, grad_norm)
        self.optimizer.zero_grad()
        self.guard.handle(bad, gather_values([record for batch in batches for record in batch.record_ids]), guilty)
        return StepResult(metrics, grad_norm, skipped=True)

    @torch.no_grad()
    def validate(self, batches: Sequence[PackedBatch]) -> StepMetrics:
        """Sums of one step's forward passes, over all ranks; nothing is dropped out."""
        with evaluation_mode(self.chunks):
            return self._run(batches, backward=False)

    def _run(self, batches: Sequence[PackedBatch], *, backward: bool, stop: bool = False) -> StepMetrics:
        metrics = StepMetrics(self.num_experts, self.device, languages=self.languages)
        weights = iter(self._weights(batches))
        batches = [self.chunks[0].module.share_of_rank(batch) for batch in batches]
        if self.flops is not None and backward and self.chunks[-1].module.post_process:
            metrics.count(flops=sum(self.flops.count(batch) for batch in batches))
        metrics.count(stop=stop)

        def loss_function(batch: PackedBatch, losses: Tensor) -> tuple[Tensor, None]:
            metrics.add_losses(batch, losses)
            return losses.sum() * next(weights, 0.0), None  # after the last there are only empty ones

        def on_routing(batch: PackedBatch, routing: RoutingOutput) -> None:
            metrics.add_routes(batch, routing, self.num_visual_rows)
            for loss in (routing.aux_loss, routing.z_loss):
                if loss is not None:
                    metrics.add_aux_loss(loss.detach() / copies)

        on_device = self._on_device(batches)
        # A lone micro-batch is the rank's whole step: the model itself gathers its counts, and its losses come out the
        # same on every rank (their gradients are each rank's share). Otherwise they are the micro-batch's share.
        copies = dist.get_world_size(replica_group())
        over_step: AbstractContextManager[None] = nullcontext()
        if backward and len(batches) > 1:
            prepared = self.chunks[0].module.prepare_step(on_device, replica_group())
            if prepared is not None:
                copies, on_device, over_step = 1, prepared.batches, prepared.active
        with over_step:
            forward_backward(self.chunks, on_device, loss_function, on_routing=on_routing, backward=backward)
        metrics.reduce(contribute=tensor_parallel_rank() == 0)
        return metrics

    def _on_device(self, batches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """Shares of this rank where the model is, with all the images that they need."""
        group = self.chunks[0].module.pg_collection.tp
        return [gather_images(batch.to(self.device, non_blocking=True), group) for batch in batches]

    def _weights(self, batches: Sequence[PackedBatch]) -> list[float]:
        """Factor of each micro-batch's summed loss; needs the number of labels, or of micro-batches, on all ranks."""
        labels = [batch.label_rows.numel() for batch in batches]
        total = torch.tensor([sum(labels), sum(count > 0 for count in labels)], dtype=torch.int64, device=self.device)
        dist.all_reduce(total, group=data_parallel_group())
        all_labels, all_batches = (max(count, 1) for count in total.tolist())
        if self.reduction == "global":
            return [1.0 / all_labels] * len(labels)
        return [1.0 / (max(count, 1) * all_batches) for count in labels]

    @torch.no_grad()
    def _guilty(self, batches: Sequence[PackedBatch]) -> list[str]:
        """Records of all ranks whose losses are no numbers; runs each micro-batch once more."""
        bad: list[str] = []

        def find(batch: PackedBatch, losses: Tensor) -> tuple[Tensor, None]:
            rows = batch.label_rows[~losses.isfinite()]
            owners = (torch.searchsorted(batch.cu_seqlens, rows, right=True) - 1).unique().tolist()
            bad.extend(batch.record_ids[i] if batch.record_ids else f"sample {i}" for i in owners)
            return losses.sum(), None

        shares = self._on_device([self.chunks[0].module.share_of_rank(batch) for batch in batches])
        forward_backward(self.chunks, shares, find, backward=False)
        return gather_values(bad)


@contextmanager
def evaluation_mode(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Nothing is dropped out; afterwards each module learns that did before."""
    learning = [module for chunk in chunks for module in chunk.modules() if module.training]
    for module in learning:
        module.training = False
    try:
        yield
    finally:
        for module in learning:
            module.training = True


def gather_values(values: Iterable[str]) -> list[str]:
    """The values of all ranks, each once."""
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, list(values))
    return sorted({value for each in everyone for value in each})
