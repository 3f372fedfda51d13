"""Steps of answers as CUDA graphs: captured once for each of a ladder of batch sizes, replayed with other numbers.

A step is captured whole, from one tensor of integers to the logits, so it may neither ask the device for a value nor
take another tensor: `StaticStep` works everything out on the device from ids, positions and block tables. Batches
between two sizes are filled up with rows that write into a block of nobody and whose logits nobody reads.

The same step runs without a graph on any device, which is how it is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from parrot_sys.data.batch import PackedBatch
from parrot_sys.engine.inputs import StepInputs
from parrot_sys.megatron.attention.paged import PagedCache, PagedRows
from parrot_sys.megatron.model import MultimodalModel

LADDER = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Batch sizes that are captured, each when it is met first."""

Replay = Callable[[], Tensor]
Capture = Callable[[Callable[[], Tensor]], Replay]


def capture_graph(step: Callable[[], Tensor]) -> Replay:
    """Records a step as a CUDA graph, after two runs in which kernels are compiled and buffers are made."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


class StaticStep:
    """A step of S answers, a row each, whose tensors stay where they are."""

    def __init__(self, model: MultimodalModel, cache: PagedCache, size: int, table_width: int) -> None:
        """
        Args:
            model: in evaluation mode, in one process.
            cache: its last block belongs to nobody.
            size: S.
            table_width: W, blocks of the longest request.
        """
        self._model = model
        self._cache = cache
        self._rest = torch.zeros(size, 2 + table_width, dtype=torch.int64)
        self._rest[:, 2] = cache.num_blocks - 1  # position 0 of nobody's block
        self.numbers = self._rest.to(cache.device, copy=True)  # (on the CPU too: `_rest` stays as it is)
        """int64 [S, 2 + W]: id, position and blocks of each answer."""
        rows = torch.arange(size + 1, dtype=torch.int32, device=cache.device)
        self._bounds, self._rows = rows, rows[:-1].long()
        self._no, self._none = rows[:-1] < 0, torch.full_like(self._rows, -1)

    def fill(self, inputs: StepInputs) -> None:
        """Takes the numbers of a step: one copy to the device."""
        staged, count = self._rest.clone(), inputs.lengths.numel()
        tables = inputs.block_tables.view(count, -1)
        staged[:count, 0], staged[:count, 1] = inputs.input_ids, inputs.position_ids
        staged[:count, 2 : 2 + tables.shape[1]] = tables
        self.numbers.copy_(staged)

    def run(self) -> Tensor:
        """Logits float32 [S, V]; the calls do not depend on any number."""
        ids, positions, tables = self.numbers[:, 0], self.numbers[:, 1], self.numbers[:, 2:]
        size = self._cache.block_size
        paged = PagedRows(
            cache=self._cache,
            blocks=tables.gather(1, (positions // size)[:, None]).squeeze(1),
            offsets=positions % size,
            block_tables=tables.int(),
            lengths=(positions + 1).int(),
            has_images=self._no,
            image_of_row=self._none,
            fresh=False,
            any_images=False,
        )
        batch = replace(
            PackedBatch.empty().to(ids.device),
            input_ids=ids,
            position_ids=positions,
            cu_seqlens=self._bounds,
            max_seqlen=1,
        )
        logits = self._model(batch, mode="logits", logits_rows=self._rows, paged=paged).logits
        assert logits is not None, "one process has all stages"
        rows: Tensor = logits.float()
        return rows


class DecodeGraphs:
    """Runs steps of answers by graphs, where they are alike."""

    def __init__(
        self,
        model: MultimodalModel,
        cache: PagedCache,
        *,
        max_rows: int,
        ladder: Sequence[int] = LADDER,
        capture: Capture = capture_graph,
    ) -> None:
        """
        Args:
            model: see `supports`.
            cache: its last block belongs to nobody.
            max_rows: of the longest request.
            ladder: batch sizes, ascending.
            capture: makes of a step what replays it.
        """
        self._model = model
        self._cache = cache
        self._width = -(-max_rows // cache.block_size)
        self._ladder = tuple(ladder)
        self._capture = capture
        self._steps: dict[int, tuple[StaticStep, Replay]] = {}

    @staticmethod
    def supports(model: MultimodalModel) -> bool:
        """Whether steps of answers make the same calls whatever they hold: no memory to plan, no experts to count rows
        for, and nothing that other processes take part in."""
        groups = model.pg_collection
        alone = groups.tp.size() == groups.pp.size() == 1
        return alone and model.bridge.steps_alike and model.bridge.llm.experts is None

    def takes(self, inputs: StepInputs) -> bool:
        """Whether a step has a row of each request, no picture, and fits."""
        count = inputs.lengths.numel()
        return (
            count <= self._ladder[-1]
            and inputs.input_ids.numel() == inputs.logits_rows.numel() == count
            and inputs.image_rows is None
            and inputs.block_tables.numel() <= count * self._width
        )

    def run(self, inputs: StepInputs) -> Tensor:
        """Logits float32 [S, V] of a step that `takes` has let in; they hold until the next call."""
        count = inputs.lengths.numel()
        size = next(own for own in self._ladder if own >= count)
        if size not in self._steps:
            step = StaticStep(self._model, self._cache, size, self._width)
            step.fill(inputs)  # numbers to be captured with: those of this step, as warming up writes them
            self._steps[size] = step, self._capture(step.run)
        step, replay = self._steps[size]
        step.fill(inputs)
        return replay()[:count]
