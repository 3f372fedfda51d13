"""Memory and step time of one layout."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from parrot_sys.planning.cluster import ClusterConfig
from parrot_sys.planning.communication import micro_batch_messages, seconds_of, step_messages
from parrot_sys.planning.compute import model_flops, optimizer_seconds, stage_seconds
from parrot_sys.planning.config import PlanConfig
from parrot_sys.planning.memory import Memory, stage_memory
from parrot_sys.planning.weights import stage_weights, trainable_weights
from parrot_sys.systems.cost import Message, Work
from parrot_sys.systems.layout import Layout
from parrot_sys.systems.system_costs import Job, MicroBatch

_DIMENSIONS = {
    "tensor": "tensor parallel",
    "context": "context parallel",
    "pipeline": "pipeline messages",
    "experts": "expert parallel",
    "expert": "expert parallel",
    "expert_tensor": "expert parallel",
    "data": "data parallel",
    "expert_data": "data parallel",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Predicted needs of a layout; of the GPU with the most memory and the stage that takes longest."""

    layout: Layout
    memory: Memory
    num_micro_batches: int  # of a rank and step
    micro_batch_rows: int  # of the largest micro-batch
    seconds: dict[str, float]  # part of the step -> time
    samples: int  # of a step
    rows: int  # of a step
    flops: float  # of a step over all GPUs, without recomputation
    peak_flops: float  # of a GPU

    @property
    def step_seconds(self) -> float:
        """Time of a step."""
        return sum(self.seconds.values())

    @property
    def samples_per_second(self) -> float:
        """Over all GPUs."""
        return self.samples / self.step_seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: share of the bf16 peak."""
        return self.flops / (self.step_seconds * self.peak_flops * self.layout.num_gpus)


def micro_batches(layout: Layout, samples_per_step: int) -> tuple[int, float, int]:
    """Number of micro-batches of the busiest rank, samples of one in the mean, and of the largest.

    The packer deals a rank's samples evenly to its micro-batches. The interleaved schedule takes a multiple of the
    pipeline size of them.
    """
    samples = math.ceil(samples_per_step / layout.data)
    number = math.ceil(samples / layout.samples)
    if layout.virtual > 1:
        number = math.ceil(number / layout.pipeline) * layout.pipeline
    return number, samples / number, math.ceil(samples / number)


def peak_memory(config: PlanConfig, job: Job, layout: Layout) -> Memory:
    """Memory of the GPU that needs most. Of like pipeline stages the first has most micro-batches in flight."""
    number, _, most = micro_batches(layout, config.global_batch_size)
    batch = config.micro_batch(most)
    stages = layout.stages(job.kinds)
    return max((stage_memory(job, layout, stage, batch, number) for stage in stages), key=lambda m: m.total)


def estimate(config: PlanConfig, job: Job, layout: Layout, memory: Memory) -> Estimate:
    """Step time of a layout whose memory is known.

    A pipeline of p stages with m micro-batches takes m times its slowest stage, and once the others to fill and drain
    it, of which v chunks a stage hide all but 1 / v (Narayanan et al., arXiv 2104.04473, section 2.2; for equal stages
    the bubble is (p - 1) / (v m)).
    """
    cluster = config.cluster
    number, mean, most = micro_batches(layout, config.global_batch_size)
    batch = config.micro_batch(mean)
    kinds = layout.stages(job.kinds)
    stages = {stage: _stage(job, layout, cluster, stage, batch) for stage in kinds}
    totals = {stage: sum(work.total for work in parts.values()) for stage, parts in stages.items()}
    slowest = max(totals, key=lambda stage: totals[stage])
    seconds: dict[str, float] = defaultdict(float)
    for name, work in stages[slowest].items():
        seconds[name] += number * work.total
    others = sum(count * totals[stage] for stage, count in kinds.items()) - totals[slowest]
    seconds["pipeline bubble"] = others / layout.virtual
    last_backward = sum(work.backward for work in stages[slowest].values())
    _add_step(seconds, job, layout, cluster, slowest, last_backward)
    typical = config.micro_batch(config.global_batch_size)
    return Estimate(
        layout=layout,
        memory=memory,
        num_micro_batches=number,
        micro_batch_rows=most * config.rows,
        seconds={name: value for name, value in seconds.items() if value > 0},
        samples=config.global_batch_size,
        rows=config.global_batch_size * config.rows,
        flops=model_flops(job, typical),
        peak_flops=cluster.peak_flops,
    )


def _stage(job: Job, layout: Layout, cluster: ClusterConfig, stage: int, batch: MicroBatch) -> dict[str, Work]:
    """Time of a micro-batch on a stage: its work, and its messages, which wait for each other."""
    parts = stage_seconds(job, layout, cluster, stage, batch)
    for message in micro_batch_messages(job, layout, stage, batch):
        time = seconds_of(message, layout, cluster)
        name = _DIMENSIONS[message.dimension]
        parts[name] = parts.get(name, Work(0.0, 0.0)) + (Work(0.0, time) if message.backward else Work(time, 0.0))
    return parts


def _add_step(
    seconds: dict[str, float], job: Job, layout: Layout, cluster: ClusterConfig, stage: int, last_backward: float
) -> None:
    """Gradients (reduced while the last backward pass runs, as far as it lasts), the update, updated parameters."""
    hidden = cluster.efficiency.overlap * last_backward

    def is_gradient(message: Message) -> bool:
        return message.backward and message.dimension in ("data", "expert_data")

    messages = step_messages(job, layout, stage)
    gradients = sum(seconds_of(message, layout, cluster) for message in messages if is_gradient(message))
    seconds["data parallel"] += max(0.0, gradients - hidden)
    for message in messages:
        if not is_gradient(message):
            seconds[_DIMENSIONS[message.dimension]] += seconds_of(message, layout, cluster)
    share = 0.0
    for weight in trainable_weights(job, stage_weights(job, layout, stage)):
        copies = layout.expert_copies if weight.routed else layout.model_copies
        share += weight.total / (copies if layout.distributed_optimizer else 1)
    seconds["optimizer"] += optimizer_seconds(cluster, share)
