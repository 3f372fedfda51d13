"""Keys and values of the rows that were already decoded: S requests of different lengths, one buffer a layer."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from parrot_sys.errors import ConfigError


class KVCache:
    """Cache of S requests for decoding: a packed prefill, then one row a request and step.

    The model writes to it and moves it on; the caller only creates it, reads `lengths` (the position of the next row of
    each request) and calls `keep` to drop finished requests. For use without autograd.
    """

    def __init__(self, num_samples: int, capacity: int, *, device: torch.device | str = "cpu") -> None:
        """
        Args:
            num_samples: S.
            capacity: longest request in rows, prompt and answer together.
            device: where keys and values will be.
        """
        self.capacity = capacity
        self.lengths = torch.zeros(num_samples, dtype=torch.int64, device=device)
        """int64 [S], rows held for each request."""
        self.memory: dict[int, tuple[Tensor, Tensor]] = {}
        """Keys and values of the prefill's whole memory, by layer, where later rows read it too."""
        self._layers: dict[Hashable, tuple[Tensor, Tensor]] = {}
        self._kept: list[Tensor] = []
        self._rows: list[int] = []  # `lengths`, known without asking the device; empty before the prefill

    @property
    def num_samples(self) -> int:
        """S."""
        return self.lengths.numel()

    @property
    def max_length(self) -> int:
        """Longest of `lengths`: of the requests that are still there, so that those that left take no room."""
        return max(self._rows, default=0)

    def check(self, num_samples: int, num_rows: int, max_seqlen: int) -> None:
        """Raise ConfigError unless the next micro-batch is the prefill or one row for each request, and fits."""
        if num_samples != self.num_samples:
            raise ConfigError(
                f"the KV cache holds {self.num_samples} requests, the micro-batch must hold as many, got {num_samples}"
            )
        if self.max_length and num_rows != num_samples:
            raise ConfigError(
                f"after the prefill each request gets one row a step ({num_samples}), got {num_rows} rows"
            )
        if self.max_length + max_seqlen > self.capacity:
            raise ConfigError(
                f"the capacity of the KV cache must be >= {self.max_length + max_seqlen} rows, got {self.capacity}"
            )

    def append(
        self,
        layer: Hashable,
        key: Tensor,
        value: Tensor,
        samples: Tensor,
        positions: Tensor,
        capacity: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Write T rows of one layer.

        Args:
            layer: number of the layer, or whatever else tells apart what has keys and values.
            key, value: [T, g, d].
            samples, positions: int64 [T], where each row belongs.
            capacity: rows of a request, when they are fewer than those of the cache.

        Returns:
            The buffers of the layer, [S, capacity, g, d] each.
        """
        if layer not in self._layers:
            shape = (self.num_samples, self.capacity if capacity is None else capacity, *key.shape[1:])
            # Zeros, not uninitialised: rows beyond a request's length are masked, but 0 * NaN would be NaN.
            self._layers[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        keys, values = self._layers[layer]
        keys[samples, positions] = key
        values[samples, positions] = value
        return keys, values

    def advance(self, lengths: Tensor, max_seqlen: int) -> None:
        """Count the rows that all layers have written: int64 [S] and their largest."""
        self.lengths = self.lengths + lengths
        # Only the prefill asks the device: after it each request gets one row (see `check`).
        self._rows = [rows + max_seqlen for rows in self._rows] if self._rows else lengths.tolist()

    def keep(self, samples: Tensor) -> None:
        """Keep only these requests, in this order: int64 [S']."""
        self._kept.append(samples)
        self._rows = [self._rows[place] for place in samples.tolist()]
        self.lengths = self.lengths.index_select(0, samples)
        self._layers = {
            layer: (keys.index_select(0, samples), values.index_select(0, samples))
            for layer, (keys, values) in self._layers.items()
        }

    def take_kept(self) -> list[Tensor]:
        """Arguments of `keep` since the last time, for caches on other ranks that must follow this one."""
        kept, self._kept = self._kept, []
        return kept
