"""Layouts that can run, and what to say of the others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from parrot_sys.errors import ConfigError
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.layout import Layout
from parrot_sys.systems.registry import system_of


def check(model: ParrotConfig, layout: Layout, num_gpus: int, samples_per_step: int) -> None:
    """Refuses a layout that cannot run.

    Raises:
        ConfigError: names the size, what it must divide, and the nearest values that do.
    """
    for name, size, of, total in _divisions(model, layout):
        if total % size:
            raise ConfigError(f"{name} must divide {of}, got {size}: {nearest_divisors(size, total)}")
    if layout.expert > 1 and not system_of(model).costs().expert_sizes(model):
        raise ConfigError(f"fix.expert must be 1 without experts (model.moe.num_experts=0), got {layout.expert}")
    if model.llm.experts is not None and layout.tensor > 1 and not layout.sequence:
        raise ConfigError(
            "fix.sequence must be true with tensor parallelism and model.llm.experts, got false: all tensor-parallel "
            "ranks would send the same rows to the experts"
        )
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
    """(name of the size, size, what it divides and its value, value)."""
    costs = system_of(model).costs()
    cut = {f"llm.{name}": size for name, size in model.llm.tensor_sizes().items()}
    if model.vision.num_layers_run:
        cut |= {f"vision.{name}": size for name, size in model.vision.tensor_sizes().items()}
    cut |= costs.tensor_sizes(model)
    rules = [("fix.tensor", layout.tensor, f"{name}={size}", size) for name, size in cut.items()]
    if kinds := costs.expert_sizes(model):
        counts, inner = ({name: sizes[place] for name, sizes in kinds.items()} for place in (0, 1))
        rules.append(("fix.expert", layout.expert, *_common(counts, "num_experts")))
        rules.append(("fix.expert_tensor", layout.expert_tensor, *_common(inner, "ffn_hidden_size")))
    return rules


def _common(sizes: Mapping[str, int], field: str) -> tuple[str, int]:
    """Number that ranks must divide which share all kinds of experts, in words and as a value."""
    each = " and ".join(f"{name}.{field}={size}" for name, size in sizes.items())
    shared = " (the same ranks share the experts of both kinds)" if len(sizes) > 1 else ""
    return each + shared, math.gcd(*sizes.values())


def nearest_divisors(size: int, total: int) -> str:
    """The divisors of `total` next to `size`, as a hint."""
    fits = [d for d in range(1, total + 1) if total % d == 0]
    below = [d for d in fits if d < size][-1:]
    above = [d for d in fits if d > size][:1]
    return f"the nearest that do are {' and '.join(map(str, below + above))}"


def divisors(total: int, at_most: int) -> Iterator[int]:
    """Divisors of `total` up to `at_most`."""
    return (d for d in range(1, min(total, at_most) + 1) if total % d == 0)
