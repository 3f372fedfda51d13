"""A layout: how a model is cut over GPUs and a step over micro-batches; what is valid, and what can be tried."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from parrot_sys.errors import ConfigError
from parrot_sys.megatron.runtime.initialize import ParallelConfig
from parrot_sys.parallel import RowSplit
from parrot_sys.systems.config import ParrotConfig


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

    def layers(self, num_layers: int, stage: int) -> int:
        """Decoder layers of a pipeline rank, in all its chunks."""
        return sum(self.chunk_layers(num_layers, stage))

    def chunk_layers(self, num_layers: int, stage: int) -> tuple[int, ...]:
        """Decoder layers of each chunk of a pipeline rank."""
        return _layers_of_stages(num_layers, self.pipeline, self.virtual)[stage :: self.pipeline]

    def local_rows(self, rows: float) -> float:
        """Rows of a pack that a context-parallel rank works on, with padding."""
        if self.context == 1:
            return rows
        parts = self.tensor if self.sequence else 1
        return RowSplit.of(math.ceil(rows), self.context, multiple_of=parts).local_rows

    def local_images(self, images: float) -> float:
        """Images of a pack that the first context-parallel rank encodes and routes."""
        return images if self.context == 1 else math.ceil(images / self.context)

    def stages(self, num_layers: int) -> dict[int, int]:
        """Pipeline ranks that differ: the first of each kind -> how many there are."""
        kinds: dict[tuple[bool, bool, int], list[int]] = {}
        for stage in range(self.pipeline):
            kind = (stage == 0, stage == self.pipeline - 1, self.layers(num_layers, stage))
            kinds.setdefault(kind, []).append(stage)
        return {stages[0]: len(stages) for stages in kinds.values()}

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
def _layers_of_stages(num_layers: int, pipeline: int, virtual: int) -> tuple[int, ...]:
    """As the trainer deals them out."""
    return Layout(pipeline=pipeline, virtual=virtual).parallel.layers_of_stages(num_layers)


def check(model: ParrotConfig, layout: Layout, num_gpus: int, samples_per_step: int) -> None:
    """Refuses a layout that cannot run.

    Raises:
        ConfigError: names the size, what it must divide, and the nearest values that do.
    """
    for name, size, of, total in _divisions(model, layout):
        if total % size:
            raise ConfigError(f"{name} must divide {of}={total}, got {size}: {nearest_divisors(size, total)}")
    if layout.expert > 1 and not model.moe.num_experts:
        raise ConfigError(f"fix.expert must be 1 without experts (model.moe.num_experts=0), got {layout.expert}")
    if layout.pipeline * layout.virtual > model.llm.num_layers:
        raise ConfigError(
            f"fix.pipeline x fix.virtual must be <= llm.num_layers={model.llm.num_layers}, got "
            f"{layout.pipeline * layout.virtual}: each stage needs a layer"
        )
    unit = layout.tensor * layout.context * layout.pipeline
    if num_gpus % unit:
        raise ConfigError(
            f"tensor x context x pipeline = {unit} must divide the {num_gpus} GPUs: {nearest_divisors(unit, num_gpus)}"
        )
    experts = layout.expert * layout.expert_tensor * layout.pipeline
    if num_gpus % experts:
        raise ConfigError(
            f"expert x expert_tensor x pipeline = {experts} must divide the {num_gpus} GPUs: "
            f"{nearest_divisors(experts, num_gpus)}"
        )
    if layout.sequence and layout.tensor == 1:
        raise ConfigError("fix.sequence needs fix.tensor >= 2, got 1")
    if layout.virtual > 1 and layout.pipeline == 1:
        raise ConfigError(f"fix.virtual={layout.virtual} needs fix.pipeline >= 2, got 1")
    if layout.data > samples_per_step:
        raise ConfigError(
            f"{layout.data} data-parallel ranks need as many samples a step, got global_batch_size={samples_per_step}: "
            f"set at least {layout.data}, or raise the tensor or pipeline parallel size"
        )


def _divisions(model: ParrotConfig, layout: Layout) -> list[tuple[str, int, str, int]]:
    """(name of the size, size, what it divides, value)."""
    tensor = ("fix.tensor", layout.tensor)
    rules = [(*tensor, f"llm.{name}", size) for name, size in model.llm.tensor_sizes().items()]
    if model.projector.depth > 1:
        rules.append((*tensor, "llm.hidden_size", model.llm.hidden_size))
    if model.vision.num_layers_run:
        rules += [(*tensor, f"vision.{name}", size) for name, size in model.vision.tensor_sizes().items()]
    if model.moe.num_experts:
        rules.append(("fix.expert", layout.expert, "moe.num_experts", model.moe.num_experts))
        rules.append(("fix.expert_tensor", layout.expert_tensor, "moe.ffn_hidden_size", model.moe.ffn_hidden_size))
    return rules


def nearest_divisors(size: int, total: int) -> str:
    """The divisors of `total` next to `size`, as a hint."""
    fits = [d for d in range(1, total + 1) if total % d == 0]
    below = [d for d in fits if d < size][-1:]
    above = [d for d in fits if d > size][:1]
    return f"the nearest that do are {' and '.join(map(str, below + above))}"


def divisors(total: int, at_most: int) -> Iterator[int]:
    """Divisors of `total` up to `at_most`."""
    return (d for d in range(1, min(total, at_most) + 1) if total % d == 0)
