"""A layout: how a model is cut over GPUs and a step over micro-batches."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from parrot_sys.megatron.runtime.initialize import ParallelConfig
from parrot_sys.parallel import RowSplit


@dataclass(kw_only=True, frozen=True, slots=True)
class Layout:
    """One way to train: parallel sizes, the optimizer's state, recomputation, and samples of a micro-batch."""

    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    virtual: int = 1  # chunks of layers of a pipeline rank; 1 is the plain schedule
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    data: int = 1
    samples: int = 1  # of a micro-batch
    recompute: bool = False
    distributed_optimizer: bool = False

    @property
    def num_gpus(self) -> int:
        """Ranks of the layout."""
        return self.tensor * self.context * self.data * self.pipeline

    @property
    def model_copies(self) -> int:
        """Ranks over which the optimizer's state of a dense parameter can be split (data and context parallel)."""
        return self.data * self.context

    @property
    def expert_copies(self) -> int:
        """Ranks that hold the same experts, or the same slice of them."""
        return self.tensor * self.context * self.data // (self.expert * self.expert_tensor)

    @property
    def dimensions(self) -> int:
        """Number of kinds of model parallelism that it uses."""
        sizes = (self.tensor, self.pipeline, self.virtual, self.context, self.expert)
        return sum(size > 1 for size in sizes)

    @property
    def parallel(self) -> ParallelConfig:
        """The same for `parrot train`."""
        return ParallelConfig(
            tensor_model_parallel_size=self.tensor,
            sequence_parallel=self.sequence,
            pipeline_model_parallel_size=self.pipeline,
            virtual_pipeline_model_parallel_size=self.virtual if self.virtual > 1 else None,
            context_parallel_size=self.context,
            expert_model_parallel_size=self.expert,
            expert_tensor_parallel_size=self.expert_tensor,
        )

    def layers(self, kinds: Sequence[int], stage: int) -> tuple[tuple[int, ...], ...]:
        """Decoder layers of each chunk of a pipeline rank.

        Args:
            kinds: for each layer one that costs the same, which stands for it.
            stage: number of the rank.
        """
        return _layers_of_stages(tuple(kinds), self.pipeline, self.virtual)[stage]

    def local_rows(self, rows: float) -> float:
        """Rows of a pack that a context-parallel rank works on, with padding."""
        if self.context == 1:
            return rows
        parts = self.tensor if self.sequence else 1
        return RowSplit.of(math.ceil(rows), self.context, multiple_of=parts).local_rows

    def rows_and_narrow(self, rows: float) -> tuple[float, float]:
        """Rows of this rank in the matrices, and in norms and residuals, of a pack."""
        local = self.local_rows(rows)
        return local, local / self.tensor if self.sequence else local

    def local_images(self, images: float) -> float:
        """Images of a pack that the first context-parallel rank encodes and routes."""
        return images if self.context == 1 else math.ceil(images / self.context)

    def stages(self, kinds: Sequence[int]) -> dict[int, int]:
        """Pipeline ranks that differ: the first of each kind -> how many there are."""
        alike: dict[tuple[bool, bool, tuple[tuple[int, ...], ...]], list[int]] = {}
        for stage in range(self.pipeline):
            key = (stage == 0, stage == self.pipeline - 1, self.layers(kinds, stage))
            alike.setdefault(key, []).append(stage)
        return {stages[0]: len(stages) for stages in alike.values()}

    def stride(self, dimension: str) -> int:
        """Distance of neighbouring ranks of a group in the order of Megatron-Core: tp, cp, (ep,) dp, pp."""
        return {
            "tensor": 1,
            "experts": 1,  # all that share the experts: expert tensor and expert parallel
            "context": self.tensor,
            "data": self.tensor,  # with the context-parallel ranks
            "expert_tensor": 1,
            "expert": self.expert_tensor,
            "expert_data": self.expert_tensor * self.expert,
            "pipeline": self.tensor * self.context * self.data,
        }[dimension]

    def describe(self) -> str:
        """Short name: the sizes that are not 1."""
        parts = {
            "TP": self.tensor,
            "PP": self.pipeline,
            "VPP": self.virtual,
            "CP": self.context,
            "EP": self.expert,
            "ETP": self.expert_tensor,
            "DP": self.data,
        }
        name = " x ".join(f"{key}{size}" for key, size in parts.items() if size > 1) or "one GPU"
        return name.replace(f"TP{self.tensor}", f"TP{self.tensor}+SP", 1) if self.sequence else name

    def flags(self, rows: int) -> list[str]:
        """Options of `parrot train` that set this layout; `rows` of a micro-batch."""
        flags = {
            "parallel.tensor-model-parallel-size": self.tensor,
            "parallel.pipeline-model-parallel-size": self.pipeline,
            "parallel.virtual-pipeline-model-parallel-size": self.virtual,
            "parallel.context-parallel-size": self.context,
            "parallel.expert-model-parallel-size": self.expert,
        }
        chosen = [f"--{name} {size}" for name, size in flags.items() if size > 1]
        if self.sequence:
            chosen.append("--parallel.sequence-parallel")
        if self.expert_tensor != self.tensor:  # what it is when not set
            chosen.append(f"--parallel.expert-tensor-parallel-size {self.expert_tensor}")
        chosen.append("--optimizer.distributed" if self.distributed_optimizer else "--optimizer.no-distributed")
        chosen.append(f"--recompute {'full' if self.recompute else 'none'}")
        chosen.append(f"--data.max-tokens-per-micro-batch {rows}")
        return chosen


@functools.cache
def _layers_of_stages(kinds: tuple[int, ...], pipeline: int, virtual: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Stage -> chunk -> layers, as the trainer deals them out: chunks take turns on the stages."""
    counts = Layout(pipeline=pipeline, virtual=virtual).parallel.layers_of_stages(len(kinds))
    chunks, start = [], 0
    for count in counts:
        chunks.append(kinds[start : start + count])
        start += count
    return tuple(tuple(chunks[stage::pipeline]) for stage in range(pipeline))
