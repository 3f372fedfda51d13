"""Making of a Job: a configuration, what of it learns, and the costs of its system."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.flops import costs, forward_passes
from parrot_sys.systems.registry import system_of
from parrot_sys.systems.system_costs import Job


def make_job(model: ParrotConfig, trainable: Mapping[str, bool], **settings: Any) -> Job:
    """A model as it is trained.

    Args:
        model: sizes.
        trainable: part -> whether it learns, of all parts of the system.
        settings: further fields of the job.
    """
    passes = forward_passes(costs(model, settings.get("bypass", ())), trainable)
    return Job(model=model, trainable=trainable, costs=system_of(model).costs(), passes=passes, **settings)
