"""One step's forward and backward passes through Megatron's schedules: no pipeline, 1F1B, interleaved 1F1B."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from parrot_sys.data.batch import PackedBatch
from parrot_sys.megatron.model import ParrotOutput
from parrot_sys.modules.text_guided_moe import RoutingOutput

R = TypeVar("R")
LossFunction = Callable[[PackedBatch, Tensor], tuple[Tensor, R]]


def forward_backward(
    chunks: Sequence[DistributedDataParallel],
    batches: Sequence[PackedBatch],
    loss_function: LossFunction[R],
    *,
    on_routing: Callable[[PackedBatch, RoutingOutput], None] | None = None,
    backward: bool = True,
) -> list[R]:
    """Runs every micro-batch and, with `backward`, leaves the gradients in the buffers, summed over the ranks.

    Args:
        chunks: from `wrap_data_parallel`.
        batches: micro-batches of this rank, on the model's device; as many on every rank, and the same ones on all
            pipeline stages.
        loss_function: called on the last pipeline stage with the losses of the label rows, float32 [L]; gives the share
            of the step's loss that the micro-batch has (0-d; the step's loss is the sum over micro-batches and
            data-parallel ranks) and anything to report.
        on_routing: called on the first pipeline stage with the routes of each micro-batch.
        backward: False only runs forward, without autograd.

    Returns:
        What `loss_function` reported for each micro-batch; nothing before the last stage.
    """
    if backward:
        for chunk in chunks:
            chunk.zero_grad_buffer()
    batches = [*batches, *_missing_batches(chunks, len(batches))]
    no_tokens = torch.zeros((), dtype=torch.int)

    def forward_step(iterator: Any, chunk: DistributedDataParallel) -> tuple[Tensor | None, Callable[..., Any]]:
        batch = next(iterator)
        output: ParrotOutput = chunk(batch, mode="loss")
        if output.routing is not None and on_routing is not None:
            on_routing(batch, output.routing)

        def reduce(losses: Tensor) -> tuple[Tensor, Tensor, R]:
            loss, report = loss_function(batch, losses)
            return loss, no_tokens, report

        return (output.hidden if output.losses is None else output.losses), reduce

    run = get_forward_backward_func()
    return run(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(batches),
        # Sizes are those of each packed micro-batch; Megatron only uses these between pipeline stages.
        seq_length=1,
        micro_batch_size=1,
        forward_only=not backward,
    )


def _missing_batches(chunks: Sequence[DistributedDataParallel], num_batches: int) -> list[PackedBatch]:
    """Empty micro-batches up to a multiple of the pipeline stages, as the interleaved schedule wants."""
    if len(chunks) == 1:
        return []
    module = chunks[0].module
    empty = module.share_of_rank(PackedBatch.empty()).to(next(module.parameters()).device)
    return [empty] * (-num_batches % module.pg_collection.pp.size())


def optimizer_step(optimizer: MegatronOptimizer) -> float:
    """Clips, updates the parameters and clears the gradients; returns the norm before clipping."""
    _, grad_norm, _ = optimizer.step()
    optimizer.zero_grad()
    return float(grad_norm)
