"""RemoteConfig: how remote files are read."""

from __future__ import annotations

import math
from dataclasses import dataclass

from parrot_sys.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteConfig:
    """How files behind an address (`s3://`, `gs://`, `https://`, ...) are read."""

    cache_gb: float = 20.0
    """Most disk space for copies of what was read, in `data.cache_dir`/remote (without one, in the system's folder for
    temporary files). The processes of a machine share it; what was not used for the longest time goes first."""
    attempts: int = 6
    """How often a request is tried before the run stops."""
    first_wait: float = 0.5
    """Seconds before the second attempt; each later one waits twice as long, at most 30 seconds."""
    timeout: float = 60.0
    """Seconds after which an attempt counts as failed."""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ConfigError(f"data.remote.attempts must be >= 1, got {self.attempts}")
        for name, value in (("cache_gb", self.cache_gb), ("first_wait", self.first_wait)):
            if not (value >= 0 and math.isfinite(value)):
                raise ConfigError(f"data.remote.{name} must be a finite number >= 0, got {value}")
        if not (self.timeout > 0 and math.isfinite(self.timeout)):
            raise ConfigError(f"data.remote.timeout must be a finite number > 0, got {self.timeout}")
