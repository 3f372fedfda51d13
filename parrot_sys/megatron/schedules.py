"""One step's forward and backward passes through Megatron's schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from parrot_sys.data.batch import PackedBatch
from parrot_sys.megatron.parrot_model import ParrotOutput

R = TypeVar("R")
LossFunction = Callable[[PackedBatch, ParrotOutput], tuple[Tensor, R]]


def forward_backward(
    model: DistributedDataParallel,
    batches: Sequence[PackedBatch],
    loss_function: LossFunction[R],
    *,
    backward: bool = True,
) -> list[R]:
    """Runs every micro-batch and, with `backward`, leaves the gradients in the buffers, summed over the ranks.

    Args:
        model: from `wrap_data_parallel`.
        batches: micro-batches of this rank, on the model's device; as many on every rank.
        loss_function: gives the share of the step's loss that the micro-batch has (0-d; the step's loss is the sum over
            micro-batches and data-parallel ranks) and anything to report.
        backward: False only runs forward, without autograd.

    Returns:
        What `loss_function` reported for each micro-batch.
    """
    if backward:
        model.zero_grad_buffer()
    no_tokens = torch.zeros((), dtype=torch.int)

    def forward_step(iterator: Any, wrapped: DistributedDataParallel) -> tuple[ParrotOutput, Callable[..., Any]]:
        batch = next(iterator)

        def reduce(output: ParrotOutput) -> tuple[Tensor, Tensor, R]:
            loss, report = loss_function(batch, output)
            return loss, no_tokens, report

        return wrapped(batch, mode="loss"), reduce

    run = get_forward_backward_func()
    return run(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=model,
        num_microbatches=len(batches),
        # Sizes are those of each packed micro-batch; Megatron only uses these between pipeline stages.
        seq_length=1,
        micro_batch_size=1,
        forward_only=not backward,
    )


def optimizer_step(optimizer: MegatronOptimizer) -> float:
    """Clips, updates the parameters and clears the gradients; returns the norm before clipping."""
    _, grad_norm, _ = optimizer.step()
    optimizer.zero_grad()
    return float(grad_norm)
