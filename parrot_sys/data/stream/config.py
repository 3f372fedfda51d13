"""StreamConfig: training from data sets that are not indexed first."""

from __future__ import annotations

from dataclasses import dataclass

from parrot_sys.errors import ConfigError

_NEED_AN_INDEX = ("language_weights", "language_alpha", "caps", "language_caps", "curriculum", "text_ratio")


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamConfig:
    """Training from data sets that are not indexed first: shard by shard, mixed by a buffer, without an end."""

    enabled: bool = False
    """Read the data sets as streams. The samples of a step then depend on the number of data-parallel ranks, and
    records are checked when they are met (docs/data.md#streams). Needs `max_steps`."""
    buffer: int = 8192
    """Records of each data set whose order is drawn together, for each data-parallel rank."""
    open_shards: int = 4
    """Shards of each data set that are read at once, a record of each in turn."""

    def __post_init__(self) -> None:
        for name in ("buffer", "open_shards"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"data.stream.{name} must be >= 1, got {value}")

    def check(self, data: object) -> None:
        """Whether a stream can do what the settings of the data want that it belongs to.

        Raises:
            ConfigError: one of them needs to know all records.
        """
        for name in _NEED_AN_INDEX:
            if self.enabled and getattr(data, name) not in (None, (), {}):
                raise ConfigError(
                    f"data.{name} needs to know all records before training, which data.stream does not: unset one of "
                    "them (data.weights works with both)"
                )
