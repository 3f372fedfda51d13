"""Sizes of an engine: cache, steps, queue, largest requests."""

from __future__ import annotations

from dataclasses import dataclass, field

from parrot_sys.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """Sizes of a step and of the queue."""

    max_rows_per_step: int = 2048
    """Most rows of all requests in one step."""
    max_logits_per_step: int = 512
    """Most rows of a step whose logits are wanted: each has a value for every token of the vocabulary."""
    max_running: int = 256
    """Most requests that are computed at the same time."""
    max_queue: int = 1024
    """Most requests that wait; further ones are refused."""

    def __post_init__(self) -> None:
        for name in ("max_running", "max_queue"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"engine.{name} must be >= 1, got {value}")
        for name in ("max_rows_per_step", "max_logits_per_step"):
            if (value := getattr(self, name)) < self.max_running:
                raise ConfigError(
                    f"engine.{name} must be at least engine.max_running={self.max_running}, so that every answer grows "
                    f"with each step, got {value}"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class AdmissionLimits:
    """Largest requests that are taken; None is no limit."""

    max_prompt_rows: int | None = None
    """Rows of a prompt with its pictures."""
    max_images: int | None = None
    """Pictures of a request."""
    max_pixels: int | None = None
    """Pixels of all pictures of a request as they were sent."""
    max_bytes: int | None = None
    """Bytes of a request as they were sent."""

    def check(self, *, prompt_rows: int = 0, images: int = 0, pixels: int = 0, size: int = 0) -> None:
        """Refuses a request that is larger.

        Raises:
            DataError: names the limit that it exceeds.
        """
        found = {
            "max_prompt_rows": (prompt_rows, "rows with its images"),
            "max_images": (images, "images"),
            "max_pixels": (pixels, "pixels"),
            "max_bytes": (size, "bytes"),
        }
        for name, (value, unit) in found.items():
            limit: int | None = getattr(self, name)
            if limit is not None and value > limit:
                raise DataError(f"a request may have at most {limit} {unit} ({name}), got {value}: shorten it")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Sizes of an engine."""

    num_blocks: int = 4096
    """Blocks of the KV cache."""
    block_size: int = 16
    """Rows of a block."""
    feature_bytes: int = 256 * 2**20
    """Bytes of tower features that are kept."""
    routed_bytes: int = 256 * 2**20
    """Bytes of image rows after routing that are kept."""
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    limits: AdmissionLimits = field(default_factory=AdmissionLimits)
