"""Memories: rows that every layer of the decoder reads, from the first pipeline stage to the last.

A memory is one tensor [M, W] for each micro-batch: the projected image rows and word embeddings that the learners
of Wings attend to, or the latents of a resampler. M memory rows of width W, T rows of the pack, K kinds of memory, H
hidden size of the decoder.

Layers get the memory as Megatron's `context` argument, and a `MemoryPlan` (which row sees what) in their
`AttentionContext`. That it is an argument, not a part of the `AttentionContext`, lets recomputation send its gradient
back. Between pipeline stages the memory is sent after the hidden states, in rows of their width, in the same message;
so its gradient comes back through all stages to whatever made it on the first.

Under tensor parallelism the layers of each rank use a part of the memory's columns, so their gradients are partial
sums. They are added up over the ranks once a stage, here: a layer must not reduce them itself
(`ColumnParallelLinear(disable_grad_reduce=True)`). Under sequence parallelism each rank sends its share of the rows.
Under context parallelism each rank holds the whole memory and reads it with its own rows of the pack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from parrot_sys.parallel import RowSplit


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Size of a memory and which of its rows each row of the pack sees; the same on every pipeline stage."""

    rows: int
    """M."""
    width: int
    """W."""
    segments: Tensor
    """int32 [T, K, 2]: first memory row that a row sees of each kind, and one past the last (equal or less: none)."""
    active: Tensor
    """bool [T]: whether the row's sample has an image."""
    positions: Tensor | None = None
    """int64 [M]: place of each memory row in its sample, where layers rotate them."""

    def padded(self, padding: int) -> MemoryPlan:
        """The plan with `padding` rows more in the pack, which see nothing."""
        return self._changed(lambda rows: F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, padding))) if padding else self

    def for_rank(self, split: RowSplit, rank: int) -> MemoryPlan:
        """The plan for a context-parallel rank's rows of the padded pack."""
        return self._changed(lambda rows: split.take(rows, rank))

    def per_row(self) -> tuple[str, ...]:
        """Fields with an entry for each row of the pack."""
        return ("segments", "active")

    def _changed(self, change: Callable[[Tensor], Tensor]) -> MemoryPlan:
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in self.per_row()}
        return replace(self, **changed)


class MemoryMessage:
    """Packs a memory into rows of the hidden states' width and back."""

    def __init__(self, hidden_size: int, tp_group: ProcessGroup, *, sequence_parallel: bool) -> None:
        """
        Args:
            hidden_size: H.
            tp_group: tensor-parallel ranks.
            sequence_parallel: each rank sends a share of the rows.
        """
        self.hidden_size = hidden_size
        self.tp_group = tp_group
        self.sequence_parallel = sequence_parallel

    def num_rows(self, plan: MemoryPlan) -> int:
        """Rows [.., 1, H] that this rank sends for a memory."""
        parts = self.tp_group.size() if self.sequence_parallel else 1
        return -(-plan.rows * plan.width // (self.hidden_size * parts))

    def pack(self, memory: Tensor, plan: MemoryPlan) -> Tensor:
        """[M, W], whole on each rank -> [rows, 1, H]."""
        parts = self.tp_group.size() if self.sequence_parallel else 1
        size = self.num_rows(plan) * parts * self.hidden_size
        flat = memory.flatten()
        if padding := size - flat.numel():
            flat = F.pad(flat, (0, padding))
        message = flat.view(-1, 1, self.hidden_size)
        if self.sequence_parallel:
            message = scatter_to_sequence_parallel_region(message, group=self.tp_group)
        return message

    def unpack(self, message: Tensor, plan: MemoryPlan) -> Tensor:
        """[rows, 1, H] -> [M, W], whole on each rank, for layers whose gradients are partial sums."""
        if self.sequence_parallel:
            message = gather_from_sequence_parallel_region(
                message, tensor_parallel_output_grad=True, group=self.tp_group
            )
        else:
            message = copy_to_tensor_model_parallel_region(message, group=self.tp_group)
        return message.flatten()[: plan.rows * plan.width].view(plan.rows, plan.width)

    def append(self, hidden: Tensor, message: Tensor) -> Tensor:
        """Hidden states [T, 1, H] and the memory's message, for the next stage."""
        return torch.cat((hidden, message))

    def split(self, received: Tensor, plan: MemoryPlan) -> tuple[Tensor, Tensor]:
        """The reverse of `append`."""
        rows = self.num_rows(plan)
        return received[: received.shape[0] - rows], received[received.shape[0] - rows :]
