"""Settings of the mix of data sets and languages, and of the steps at which it changes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from parrot_sys.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class MixStage:
    """The mix from a step on. What is not set is as `data` says."""

    from_step: int
    """First step (from 0) that has this mix; it ends where the next stage begins."""
    weights: tuple[float, ...] | None = None
    """As `data.weights`."""
    language_weights: dict[str, float] | None = None
    """As `data.language_weights`."""
    language_alpha: float | None = None
    """As `data.language_alpha`."""
    caps: dict[str, int] | None = None
    """As `data.caps`."""
    language_caps: dict[str, int] | None = None
    """As `data.language_caps`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mix:
    """One mix, with every default filled in."""

    weights: Mapping[str, float]
    """Data set -> weight; one that is absent has 1."""
    language_weights: Mapping[str, float]
    """Language, or SET/LANGUAGE -> weight."""
    alpha: float = 1.0
    caps: Mapping[str, int]
    language_caps: Mapping[str, int]

    def weight(self, data_set: str, language: str) -> float:
        """How often an epoch takes each record of a language in a data set, before temperature and caps."""
        own = self.language_weights.get(f"{data_set}/{language}", self.language_weights.get(language, 1.0))
        return self.weights.get(data_set, 1.0) * own

    def check(self, data_sets: Sequence[str], found: Sequence[tuple[str, str]]) -> None:
        """Compares names with what there is.

        Args:
            data_sets: names of all data sets.
            found: (data set, language) of all records.

        Raises:
            ConfigError: a setting names a data set or a language that there is not.
        """
        languages = sorted({language for _, language in found})
        pairs = {f"{data_set}/{language}" for data_set, language in found}
        for setting, names, known in (
            ("language_weights", self.language_weights, {*languages, *pairs}),
            ("language_caps", self.language_caps, set(languages)),
        ):
            if unknown := sorted(set(names) - known):
                raise ConfigError(f"data.{setting} names {unknown[0]!r}; the data have the languages {languages}")
        if unknown := sorted(set(self.caps) - set(data_sets)):
            raise ConfigError(f"data.caps names {unknown[0]!r}; the data sets are {sorted(data_sets)} (data.names)")


def check_mix(values: Any, prefix: str, sets: int) -> None:
    """
    Args:
        values: a MixStage, or a DataConfig.
        prefix: of its settings' names.
        sets: number of data sets.

    Raises:
        ConfigError: a value is out of range.
    """
    if (weights := values.weights or ()) and len(weights) not in (1, sets):
        raise ConfigError(f"{prefix}weights must hold one value for each of the {sets} data.paths, got {len(weights)}")
    for name, weight in _weights(values, prefix):
        if not (weight >= 0 and math.isfinite(weight)):
            raise ConfigError(f"{name} must be a finite number >= 0, got {weight}")
    alpha = values.language_alpha
    if alpha is not None and not (alpha >= 0 and math.isfinite(alpha)):
        raise ConfigError(f"{prefix}language_alpha must be a finite number >= 0 or unset, got {alpha}")
    for name in ("caps", "language_caps"):
        for key, cap in (getattr(values, name) or {}).items():
            if cap < 0:
                raise ConfigError(f"{prefix}{name}.{key} must be >= 0, got {cap}")


def _weights(values: Any, prefix: str) -> Iterator[tuple[str, float]]:
    for i, weight in enumerate(values.weights or ()):
        yield f"{prefix}weights[{i}]", weight
    for language, weight in (values.language_weights or {}).items():
        yield f"{prefix}language_weights.{language}", weight


def check_curriculum(stages: Sequence[MixStage], sets: int) -> None:
    """
    Raises:
        ConfigError: a stage has a value out of range, or does not begin after the one before.
    """
    before = 0
    for number, stage in enumerate(stages):
        if stage.from_step <= before:
            raise ConfigError(
                f"data.curriculum[{number}].from_step must be > {before}"
                + (", where the stage before begins" if number else "; until then the mix is that of `data`")
                + f", got {stage.from_step}"
            )
        before = stage.from_step
        check_mix(stage, f"data.curriculum[{number}].", sets)
