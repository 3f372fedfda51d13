"""The order of samples that a configuration asks for, from the records of its data sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from parrot_sys.config_values import config_to_dict
from parrot_sys.data.config import DataConfig
from parrot_sys.data.datasets import RecordDataset
from parrot_sys.data.mixture import Group, SampleOrder, mixed
from parrot_sys.errors import ConfigError


def sample_order(config: DataConfig, datasets: Sequence[RecordDataset], batch_size: int) -> SampleOrder:
    """The order of the samples of all data sets, which are numbered through.

    Args:
        config: mix and seed.
        datasets: in the order of `config.sources()`.
        batch_size: samples of a step, for the steps of the curriculum.

    Raises:
        ConfigError: a setting names what there is not, or a mix leaves no sample.
    """
    groups = sample_groups(datasets, by_images=config.text_ratio is not None)
    found = [(group.data_set, group.language) for group in groups]
    stages: list[tuple[int, Sequence[Group]]] = []
    for step, mix in config.mixes():
        mix.check([dataset.source.name for dataset in datasets], found)
        own = mixed(groups, mix)
        where = f" from step {step} on" if step else ""
        if config.text_ratio is not None:
            _check_kinds(own, config.text_ratio, where)
        elif not sum(group.count for group in own):
            raise ConfigError(f"data.weights, data.language_weights and caps leave no sample in an epoch{where}")
        if not step:
            length = len(SampleOrder([(0, own)], config.seed, config.text_ratio))
        stages.append((_samples_before(step, length, batch_size), own))
    return SampleOrder(stages, config.seed, config.text_ratio)


def mix_identity(config: DataConfig) -> dict[str, Any]:
    """Settings of the mix that decide the order of samples, beside the weights of the data sets."""
    identity: dict[str, Any] = {"data.language_weights": dict(sorted(config.language_weights.items()))}
    for name in ("caps", "language_caps"):
        if caps := getattr(config, name):
            identity[f"data.{name}"] = dict(sorted(caps.items()))
    for name in ("language_alpha", "text_ratio"):
        if (value := getattr(config, name)) is not None:
            identity[f"data.{name}"] = value
    if config.curriculum:
        identity["data.curriculum"] = [config_to_dict(stage) for stage in config.curriculum]
    return identity


def sample_groups(datasets: Sequence[RecordDataset], *, by_images: bool = False) -> list[Group]:
    """Samples by data set and language (and, `by_images`, whether they have any), numbered through all data sets."""
    groups = []
    start = 0
    for dataset in datasets:
        text_only = ~dataset.has_images if by_images else np.zeros(len(dataset), dtype=bool)
        for language in dataset.known_languages:
            spoken = dataset.speaks(language)
            for kind in (False, True) if by_images else (False,):
                members = np.flatnonzero(spoken & (text_only == kind))
                groups.append(Group(start + members, 1.0, kind, dataset.source.name, language))
        start += len(dataset)
    return groups


def _samples_before(step: int, epoch_length: int, batch_size: int) -> int:
    """Samples before a step; the last step of an epoch may have fewer than the others."""
    steps = -(-epoch_length // batch_size)
    return step // steps * epoch_length + step % steps * batch_size


def _check_kinds(groups: Sequence[Group], text_ratio: float, where: str) -> None:
    """Whether there are samples of both kinds that a ratio can hold between."""
    for text_only, kind in ((False, "with"), (True, "without")):
        if not sum(group.count for group in groups if group.text_only == text_only):
            raise ConfigError(
                f"data.text_ratio={text_ratio} needs samples with and without images, got none {kind} an image{where}: "
                "add a data set, or unset it"
            )
