"""Several processes serve one model: rank 0 runs the program, the others repeat its model calls.

Programs (chat, evaluation, anything on `load_pretrained`) stay as they are for one process. What they ask of the model
goes through `Lockstep`, which tells the other ranks first. Messages are Python objects: some hundred microseconds a
step, next to nothing beside a forward pass of a model that needs several GPUs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parrot_sys.data.batch import PackedBatch
from parrot_sys.data.packing import Sample, pack_samples
from parrot_sys.errors import ConfigError
from parrot_sys.megatron.attention.kv_cache import KVCache
from parrot_sys.megatron.bridge import RequestState
from parrot_sys.megatron.model import MultimodalModel, ParrotOutput
from parrot_sys.megatron.runtime.initialize import ParallelConfig
from parrot_sys.megatron.runtime.pipeline import forward_logits
from parrot_sys.modules.text_guided_moe import RoutingOverride
from parrot_sys.systems.build import config_of
from parrot_sys.systems.config import ParrotConfig

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class _Forward:
    """A model call, with everything on the CPU."""

    batch: PackedBatch
    logits_rows: Tensor | None
    routing_override: RoutingOverride | None
    cache: tuple[int, int, int] | None
    """Number of the KV cache, its requests when it was new, its capacity."""
    kept: tuple[Tensor, ...]
    """Arguments of `KVCache.keep` since the last call."""


@dataclass(frozen=True, slots=True)
class _Encode:
    """Images for the vision tower, [n, 3, h, w]."""

    pixels: Tensor


@dataclass(slots=True)
class CachedRequests:
    """Requests that are being answered: keys and values of their rows, and what their system remembers of them."""

    cache: KVCache
    state: RequestState | None = None
    """From the last forward pass."""

    def keep(self, samples: Tensor) -> None:
        """Keep only these requests, in this order: int64 [S']."""
        self.cache.keep(samples)
        self.state = None if self.state is None else self.state.select(samples)


class Lockstep:
    """Calls of one model, repeated by all ranks. Without `lead`, every rank makes the same calls by itself."""

    def __init__(self, model: MultimodalModel) -> None:
        self.model = model
        self._leads = False
        self._caches = 0
        self._own: tuple[int, CachedRequests] | None = None  # of a follower

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.model.parameters()).device

    @property
    def config(self) -> ParrotConfig:
        """Sizes and options of the model."""
        return config_of(self.model)

    def pack(self, samples: Sequence[Sample], *, max_seq_len: int | None = None) -> PackedBatch:
        """The samples as one micro-batch on the model's device.

        Args:
            samples: with their images.
            max_seq_len: longer samples are cut.
        """
        config = self.config
        batch = pack_samples(
            samples, num_visual_rows=config.rows_per_image, guidance=config.moe.guidance, max_seq_len=max_seq_len
        )
        return batch.to(self.device)

    def forward(
        self,
        batch: PackedBatch,
        *,
        logits_rows: Tensor | None = None,
        routing_override: RoutingOverride | None = None,
        requests: CachedRequests | None = None,
        output_router_weights: bool = False,
    ) -> ParrotOutput:
        """Logits and routes of a micro-batch; see `MultimodalModel.forward`. Moves `requests` on.

        Raises:
            ConfigError: router weights are asked of several processes.
        """
        if output_router_weights and dist.get_world_size() > 1:
            raise ConfigError("router weights are given by one process only: load the model without a layout")
        if self._leads:
            self._tell(self._describe(batch, logits_rows, routing_override, requests))
        output = forward_logits(
            self.model,
            batch,
            logits_rows=logits_rows,
            routing_override=routing_override,
            kv_cache=None if requests is None else requests.cache,
            state=None if requests is None else requests.state,
            output_router_weights=output_router_weights,
        )
        if requests is not None:
            requests.state = output.state
        return output

    def encode(self, pixels: Tensor) -> Tensor | None:
        """Features [n, V, C] of images [n, 3, h, w]; None where the vision tower is not."""
        if self._leads:
            self._tell(_Encode(pixels.to(_CPU)))
        tower = self.model.vision_tower
        if tower is None:
            return None
        features: Tensor = tower(pixels.to(self.device, self.model.config.params_dtype))
        return features

    def run(self, program: Callable[[], int]) -> int:
        """Runs `program` on rank 0 while the other ranks follow it.

        Returns:
            What the program returned; 0 on the other ranks.
        """
        if dist.get_world_size() == 1:
            return program()
        if dist.get_rank() > 0:
            self._follow()
            return 0
        self._leads = True
        try:
            return program()
        finally:
            self._tell(None)
            self._leads = False

    def _describe(
        self,
        batch: PackedBatch,
        logits_rows: Tensor | None,
        override: RoutingOverride | None,
        requests: CachedRequests | None,
    ) -> _Forward:
        if override is not None and override.probs is not None:
            override = RoutingOverride(probs=override.probs.to(_CPU))
        number = None
        kept: tuple[Tensor, ...] = ()
        if requests is not None:
            cache = requests.cache
            if not cache.max_length:
                self._caches += 1
            kept = tuple(samples.to(_CPU) for samples in cache.take_kept())
            number = (self._caches, cache.num_samples, cache.capacity)
        rows = None if logits_rows is None else logits_rows.to(_CPU)
        return _Forward(batch.to(_CPU), rows, override, number, kept)

    def _tell(self, message: _Forward | _Encode | None) -> None:
        dist.broadcast_object_list([message], src=0)

    @torch.inference_mode()
    def _follow(self) -> None:
        while True:
            box: list[Any] = [None]
            dist.broadcast_object_list(box, src=0)
            message = box[0]
            if message is None:
                return
            if isinstance(message, _Encode):
                self.encode(message.pixels)
                continue
            rows = None if message.logits_rows is None else message.logits_rows.to(self.device)
            batch, own = message.batch.to(self.device), self._own_requests(message)
            self.forward(batch, logits_rows=rows, routing_override=message.routing_override, requests=own)

    def _own_requests(self, message: _Forward) -> CachedRequests | None:
        """This rank's part of the leader's cache and state. The leader uses one after the other."""
        if message.cache is None:
            return None
        number, num_samples, capacity = message.cache
        if self._own is None or self._own[0] != number:
            self._own = number, CachedRequests(KVCache(num_samples, capacity, device=self.device))
        requests = self._own[1]
        for samples in message.kept:
            requests.keep(samples.to(self.device))
        return requests


def inference_layout(parallel: ParallelConfig | None) -> ParallelConfig:
    """The layout for inference: sequence parallelism only saves memory in training and is switched off.

    Raises:
        ConfigError: the layout has what inference lacks.
    """
    parallel = parallel or ParallelConfig()
    for name in ("context_parallel_size", "virtual_pipeline_model_parallel_size"):
        if (size := getattr(parallel, name)) not in (None, 1):
            raise ConfigError(f"parallel.{name} is for training only, got {size}: leave it unset")
    return dataclasses.replace(parallel, sequence_parallel=False)


def check_processes(parallel: ParallelConfig, world_size: int) -> None:
    """Raise ConfigError unless `world_size` processes serve exactly one model."""
    tensor = parallel.tensor_model_parallel_size
    experts = (parallel.expert_tensor_parallel_size or tensor) * parallel.expert_model_parallel_size
    needed = max(tensor, experts) * parallel.pipeline_model_parallel_size
    if world_size != needed:
        raise ConfigError(
            f"this layout serves one model with {needed} processes, got {world_size}: start {needed}, or set "
            "parallel.tensor_model_parallel_size or parallel.pipeline_model_parallel_size"
        )
