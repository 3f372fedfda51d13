"""The systems by name: a system is a folder here and a line in this file."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from parrot_sys.systems.base import System
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.llava.system import Llava
from parrot_sys.systems.multimodal_gpt.system import MultimodalGpt
from parrot_sys.systems.parrot.system import Parrot
from parrot_sys.systems.wings.system import Wings

SYSTEMS: dict[str, System] = {system.name: system for system in (Parrot(), Wings(), MultimodalGpt(), Llava())}
"""Name -> system."""
RELEASED_TYPES: dict[str, System] = {kind: system for system in SYSTEMS.values() for kind in system.model_types}
"""model_type of every released layout -> system; others are bare language models."""


def system_of(model: ParrotConfig) -> System:
    """System of a configuration: the one whose section is set."""
    key = None if model.section is None else model.section.key
    return next(system for system in SYSTEMS.values() if system.section == key)


def part_of(name: str, model: ParrotConfig) -> str:
    """Part that a parameter of `MultimodalModel` belongs to, by its name as `named_parameters` gives it; "" for the
    name of anything else."""
    found = [part for part, what in system_of(model).parts.items() if what.has(name)]
    return found[-1] if found else ""  # the innermost


def rate_of(name: str, model: ParrotConfig, rates: Collection[str]) -> str:
    """Name in `rates` (of `optimizer.lrs`) whose learning rate a parameter of `MultimodalModel` has; "" for the common
    one."""
    return system_of(model).rate_of(name, rates)


def saved_bypass(settings: Mapping[str, Any], model: ParrotConfig) -> frozenset[str]:
    """Parts that a run passed by, from its saved settings (config.yaml).

    Args:
        settings: of the run; earlier versions had a switch for each such part.
        model: of the run.
    """
    switches = {"use_moe": "moe", "use_router": "textual_learners"}
    off = {part for name, part in switches.items() if settings.get(name) is False}
    return frozenset({*settings.get("bypass", ()), *off} & set(system_of(model).present_parts(model)))


def all_parts() -> list[str]:
    """Names of the parts of all systems."""
    names: Iterable[str] = (name for system in SYSTEMS.values() for name in system.parts)
    return list(dict.fromkeys(names))
