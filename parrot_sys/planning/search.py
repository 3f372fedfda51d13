"""All layouts of a model on a cluster, and the best of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NoReturn

from parrot_sys.errors import ConfigError
from parrot_sys.planning.checks import check, divisors
from parrot_sys.planning.config import PlanConfig
from parrot_sys.planning.estimate import Estimate, estimate, peak_memory
from parrot_sys.systems.layout import Layout
from parrot_sys.systems.registry import system_of

_LONG_SAMPLE = 4096
"""Rows of a sample from which context parallelism is tried."""
_ALIKE = 1.01
_MOST_ROWS = 65_536
"""Rows of the largest micro-batch that is tried."""


class NothingFits(ConfigError):
    """No layout of the model fits the memory of the GPUs."""


def find_layouts(config: PlanConfig) -> list[Estimate]:
    """Layouts that fit, fastest first; of equally fast ones the one with less memory.

    Raises:
        ConfigError: what is fixed cannot run; names the nearest values that can.
        NothingFits: everything that can run needs more memory than there is; says how much and what would do.
    """
    job = config.job()
    candidates = list(_candidates(config))
    if not candidates:
        _explain_invalid(config)
    found, fits, smallest = [], set(), None
    for layout in candidates:
        # Recomputation only costs time where everything fits without it, which comes first.
        if layout.recompute and replace(layout, recompute=False) in fits:
            continue
        memory = peak_memory(config, job, layout)
        if smallest is None or memory.total < smallest[1].total:
            smallest = (layout, memory)
        if memory.total <= config.cluster.usable_bytes:
            fits.add(layout)
            found.append(estimate(config, job, layout, memory))
    if not found:
        assert smallest is not None, "there are candidates"
        layout, memory = smallest
        usable = config.cluster.usable_bytes
        largest = max(memory.as_dict().items(), key=lambda item: item[1])
        raise NothingFits(
            f"no layout fits {config.cluster.num_gpus} x {config.cluster.gpu}: the smallest ({layout.describe()}) "
            f"needs {memory.total / 1e9:.1f} GB a GPU, {usable / 1e9:.1f} GB are usable; most of it is {largest[0]} "
            f"({largest[1] / 1e9:.1f} GB). {_what_would_fit(config)}"
        )
    return sorted(found, key=lambda e: (e.step_seconds, e.memory.total))


def choose(estimates: Sequence[Estimate]) -> Estimate:
    """The layout to use: of those within 1% of the fastest, which no formula tells apart, the simplest, then smallest.

    Args:
        estimates: at least one, fastest first.
    """
    near = [each for each in estimates if each.step_seconds <= _ALIKE * estimates[0].step_seconds]
    return min(near, key=lambda each: (each.layout.dimensions, each.memory.total))


def _choices(config: PlanConfig) -> Iterator[Layout]:
    """Every combination, also those that cannot run."""
    fix, model, gpus = config.fix, config.model, config.cluster.num_gpus
    counts = [count for count, _ in system_of(model).costs().expert_sizes(model).values()]
    experts = math.gcd(*counts) or 1
    contexts = [1] if config.rows < _LONG_SAMPLE else [1, 2, 4, 8, 16]
    for tensor in _fixed(fix.tensor, divisors(gpus, config.cluster.gpus_per_node)):
        for pipeline in _fixed(fix.pipeline, divisors(max(1, gpus // tensor), model.llm.num_layers)):
            chunks = [v for v in (1, 2, 4) if v == 1 or (pipeline > 1 and pipeline * v <= model.llm.num_layers)]
            for context in _fixed(fix.context, contexts):
                data = max(1, gpus // (tensor * pipeline * context))
                for expert in _fixed(fix.expert, divisors(experts, tensor * context * data)):
                    for virtual in _fixed(fix.virtual, chunks):
                        for expert_tensor in _fixed(fix.expert_tensor, {1, tensor} if counts else {1}):
                            yield Layout(
                                tensor=tensor,
                                sequence=tensor > 1 if fix.sequence is None else fix.sequence,
                                pipeline=pipeline,
                                virtual=virtual,
                                context=context,
                                expert=expert,
                                expert_tensor=expert_tensor,
                                data=data,
                            )


def _fixed(value: int | None, choices: Iterator[int] | list[int] | set[int]) -> list[int]:
    return [value] if value is not None else sorted(choices)


def _candidates(config: PlanConfig) -> Iterator[Layout]:
    """Layouts that can run, with every size of micro-batch and every way to save memory."""
    fix = config.fix
    recomputes = [False, True] if fix.recompute is None else [fix.recompute == "full"]
    for layout in _choices(config):
        try:
            check(config.model, layout, config.cluster.num_gpus, config.global_batch_size)
        except ConfigError:
            continue
        share = -(-config.global_batch_size // layout.data)
        sizes = [2**i for i in range(share.bit_length()) if i == 0 or 2**i * config.rows <= _MOST_ROWS]
        splits = [False, True] if layout.model_copies > 1 else [False]
        if fix.distributed_optimizer is not None:
            splits = [fix.distributed_optimizer]
        for samples in _fixed(fix.samples, sizes):
            for recompute in recomputes:
                for split in splits:
                    yield replace(layout, samples=samples, recompute=recompute, distributed_optimizer=split)


def _explain_invalid(config: PlanConfig) -> NoReturn:
    """
    Raises:
        ConfigError: always, with what is wrong with the least cut layout.
    """
    for layout in _choices(config):
        check(config.model, layout, config.cluster.num_gpus, config.global_batch_size)
    raise AssertionError("called when no layout can run")


def _what_would_fit(config: PlanConfig) -> str:
    """Advice: more nodes, or a smaller problem."""
    nodes = config.cluster.nodes
    for _ in range(6):
        nodes *= 2
        larger = replace(config, cluster=replace(config.cluster, nodes=nodes))
        job = larger.job()
        for layout in _candidates(larger):
            if peak_memory(larger, job, layout).total <= larger.cluster.usable_bytes:
                return f"On {larger.cluster.num_gpus} GPUs {layout.describe()} fits"
    return "More GPUs do not help: freeze parts (trainable.llm false), shorten the samples, or unset fix.*"
