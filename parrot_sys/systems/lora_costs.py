"""Costs of linear layers that may have low-rank updates, as `parrot_sys.megatron.lora` cuts them.

t tensor-parallel ranks, r rank of the updates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from parrot_sys.modules.lora import LoRAConfig
from parrot_sys.systems.cost import Message, Operation, Weight, message

if TYPE_CHECKING:
    from parrot_sys.systems.layout import Layout
    from parrot_sys.systems.system_costs import Job


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """A linear layer whose output (column-parallel) or input (row-parallel) tensor-parallel ranks cut."""

    part: str
    """That its own weight belongs to."""
    inputs: int
    """Width of its rows before the cut."""
    outputs: Mapping[str, int]
    """Released name of each projection -> its width before the cut."""
    row: bool = False
    """Whether it is row-parallel."""
    whole_rows: bool = False
    """Whether each rank has all of its rows under sequence parallelism too (rows of a memory)."""

    def updates(self, lora: LoRAConfig | None) -> list[str]:
        """Projections with an update."""
        return [] if lora is None else [name for name in self.outputs if name in lora.targets]

    def sequence(self, layout: Layout) -> bool:
        """Whether ranks have parts of its rows."""
        return layout.sequence and not self.whole_rows


def linear_weights(linear: Linear, lora: LoRAConfig | None, layout: Layout) -> Iterator[Weight]:
    """The layer's weight and its updates: the matrix next to the cut is cut, the other one whole."""
    tensor = layout.tensor
    yield Weight(linear.part, linear.inputs * sum(linear.outputs.values()) // tensor)
    for name in linear.updates(lora):
        assert lora is not None, "there are updates"
        a, b = lora.rank * linear.inputs, lora.rank * linear.outputs[name]
        whole, cut = (b, a) if linear.row else (a, b)
        yield Weight("lora", cut // tensor)
        yield Weight("lora", whole, replicated=not linear.whole_rows)


def update_work(linear: Linear, lora: LoRAConfig | None) -> float:
    """Multiply-adds of the updates for a row, times two."""
    rank = 0 if lora is None else lora.rank
    return 2.0 * rank * sum(linear.inputs + linear.outputs[name] for name in linear.updates(lora))


def linear_bytes(
    linear: Linear, job: Job, layout: Layout, rows: float, narrow: float, *, input_is_kept: bool = False
) -> float:
    """Bytes that the layer keeps: its input, if the weight or an update learns, and the r-wide rows of the updates.

    With dropout each update has an input of its own, and a mask, which the rows' gradients need also if it is frozen.

    Args:
        linear: the layer.
        job: the model as it is trained.
        layout: of the ranks.
        rows: of this rank in the matrices.
        narrow: of this rank under sequence parallelism.
        input_is_kept: something else keeps the input.
    """
    lora, updates = job.model.lora, linear.updates(job.model.lora)
    width = linear.inputs / layout.tensor if linear.row else linear.inputs
    before, between = (rows, narrow) if linear.row else (narrow, rows)
    dropout, learns = lora is not None and lora.dropout > 0, bool(updates) and job.learns("lora")
    kept = 0.0
    if (job.learns(linear.part) or (learns and not dropout)) and not input_is_kept:
        kept += job.bytes * width * before
    if dropout:
        mask = job.bytes if job.kernels == "cpu" else 1
        kept += (mask + job.bytes * learns) * len(updates) * width * before
    if learns and lora is not None:
        kept += job.bytes * len(updates) * lora.rank * between
    return kept


def pair_messages(
    job: Job, layout: Layout, rows: float, column: Linear, row: Linear, *, rows_learn: bool
) -> Iterator[Message]:
    """A column-parallel layer and the row-parallel one after it: one sum over the ranks in each direction.

    Under sequence parallelism a rank keeps its own rows only, so that the gradients of a column-parallel weight need
    its input gathered once more; recomputation repeats the forward pass.

    Args:
        job: the model as it is trained.
        layout: of the ranks.
        rows: of this rank in the matrices.
        column, row: the layers.
        rows_learn: whether the rows that come in carry a gradient.
    """
    payload, size, again = job.bytes * rows * column.inputs, layout.tensor, int(layout.recompute)
    if layout.sequence:
        yield message("tensor", "all_gather", payload, 1, size)
        yield message("tensor", "reduce_scatter", payload, 1, size)
        gathers = 1 + again + job.learns(column.part)
        yield message("tensor", "all_gather", payload, gathers, size, backward=True)
        yield message("tensor", "reduce_scatter", payload, rows_learn + again, size, backward=True)
    else:
        yield message("tensor", "all_reduce", payload, 1, size)
        yield message("tensor", "all_reduce", payload, rows_learn + again, size, backward=True)
    for linear in (column, row):
        yield from update_messages(linear, job, layout, rows, rows_learn=rows_learn or linear is row)


def update_messages(linear: Linear, job: Job, layout: Layout, rows: float, *, rows_learn: bool) -> Iterator[Message]:
    """Messages of a layer's updates: r-wide rows, between the two matrices."""
    updates = linear.updates(job.model.lora)
    if not updates or job.model.lora is None:
        return
    again, size = int(layout.recompute), layout.tensor
    back = int(job.learns("lora") or rows_learn)
    # One adapter for each projection, all in one message.
    payload = job.bytes * rows * job.model.lora.rank * len(updates)
    if linear.sequence(layout):
        ways: tuple[Operation, Operation] = ("all_gather", "reduce_scatter")
        there, home = reversed(ways) if linear.row else ways
        yield message("tensor", there, payload, 1, size)
        yield message("tensor", there, payload, again, size, backward=True)
        yield message("tensor", home, payload, back, size, backward=True)
    elif linear.row:
        yield message("tensor", "all_reduce", payload, 1, size)
        yield message("tensor", "all_reduce", payload, again, size, backward=True)
    else:
        yield message("tensor", "all_reduce", payload, back, size, backward=True)
