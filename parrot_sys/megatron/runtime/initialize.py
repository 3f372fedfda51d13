"""Process groups: from a `ParallelConfig` to an initialised `torch.distributed` and Megatron-Core, and back."""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from parrot_sys import platform
from parrot_sys.errors import ConfigError
from parrot_sys.parallel.rendezvous import fresh_store


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Division of the model over the ranks; the ranks that remain hold copies of it (data parallel)."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each matrix."""
    sequence_parallel: bool = False
    """Also cut norms and residuals along the rows (needs tensor parallelism)."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the layers."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Chunks of layers a pipeline rank holds (interleaved schedule)."""
    pipeline_layers: tuple[int, ...] = ()
    """Decoder layers of each stage, in the order in which rows pass them (first chunks of all ranks, then second ones);
    evenly spread when not set."""
    context_parallel_size: int = 1
    """Ranks that share the rows of each micro-batch, for long samples (training only)."""
    expert_model_parallel_size: int = 1
    """Ranks that share the experts."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that share each expert; `tensor_model_parallel_size` when not set."""

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the decoder together."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def expert_tensor_size(self) -> int:
        """Ranks that share each expert, as set or by default."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def num_stages(self) -> int:
        """Pipeline stages, each chunk of a rank counted."""
        return self.pipeline_model_parallel_size * (self.virtual_pipeline_model_parallel_size or 1)

    def layers_of_stages(self, num_layers: int) -> tuple[int, ...]:
        """Decoder layers of each stage: as `pipeline_layers` says, else even, with the rest on the middle stages.

        The first stage also has the vision tower and the experts, the last one the LM head.

        Raises:
            ConfigError: the layers do not add up, or there are fewer than stages.
        """
        stages = self.num_stages
        if self.pipeline_layers:
            if sum(self.pipeline_layers) != num_layers:
                raise ConfigError(
                    f"parallel.pipeline_layers must add up to the {num_layers} layers of the decoder, "
                    f"got {list(self.pipeline_layers)}, which are {sum(self.pipeline_layers)}"
                )
            return self.pipeline_layers
        if num_layers < stages:
            raise ConfigError(
                f"llm.num_layers must be >= the {stages} pipeline stages (pipeline x virtual), got {num_layers}: "
                f"use at most {num_layers} stages"
            )
        each, rest = divmod(num_layers, stages)
        first = (stages - rest + 1) // 2
        return tuple(each + (first <= stage < first + rest) for stage in range(stages))

    def check_tensor_sizes(self, section: str, sizes: Mapping[str, int]) -> None:
        """Refuses sizes that cannot be cut over the tensor-parallel ranks.

        Args:
            section: of the configuration, for the message.
            sizes: name -> number of heads, columns or rows that the ranks share.

        Raises:
            ConfigError: names the size and the nearest `tensor_model_parallel_size` that fits all of them.
        """
        tensor, together = self.tensor_model_parallel_size, math.gcd(*sizes.values())
        for name, size in sizes.items():
            if size % tensor:
                fits = (parts for parts in range(1, together + 1) if together % parts == 0)
                raise ConfigError(
                    f"{section}.{name} must be a multiple of parallel.tensor_model_parallel_size={tensor}, got {size}: "
                    f"the nearest size that fits is {min(fits, key=lambda parts: (abs(parts - tensor), parts))}"
                )

    def __post_init__(self) -> None:
        for name in ("tensor_model", "pipeline_model", "context", "expert_model"):
            if (size := getattr(self, f"{name}_parallel_size")) < 1:
                raise ConfigError(f"parallel.{name}_parallel_size must be >= 1, got {size}")
        if self.expert_tensor_parallel_size is not None and self.expert_tensor_parallel_size < 1:
            raise ConfigError(
                f"parallel.expert_tensor_parallel_size must be >= 1, got {self.expert_tensor_parallel_size}"
            )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ConfigError(
                "parallel.sequence_parallel needs parallel.tensor_model_parallel_size >= 2, got 1: "
                "raise it or set sequence_parallel to false"
            )
        layers = self.pipeline_layers
        if layers and (len(layers) != self.num_stages or min(layers) < 0):
            raise ConfigError(
                f"parallel.pipeline_layers must name the layers (>= 0) of each of the {self.num_stages} stages "
                f"(pipeline x virtual), got {list(layers)}"
            )
        chunks = self.virtual_pipeline_model_parallel_size
        if chunks is not None and (chunks < 2 or self.pipeline_model_parallel_size < 2):
            raise ConfigError(
                "parallel.virtual_pipeline_model_parallel_size must be >= 2 with pipeline_model_parallel_size >= 2, "
                f"got {chunks} with {self.pipeline_model_parallel_size}: leave it unset"
            )

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the model among `world_size` ranks.

        Raises:
            ConfigError: if the ranks cannot be dealt out; names the nearest numbers of ranks that can.
        """
        experts = self.expert_tensor_size * self.expert_model_parallel_size * self.pipeline_model_parallel_size
        for unit, product in (
            (self.model_parallel_size, "tensor x pipeline x context"),
            (experts, "expert tensor x expert x pipeline"),
        ):
            if world_size % unit:
                below, above = world_size // unit * unit, (world_size // unit + 1) * unit
                near = f"{below} or {above}" if below else f"{above}"
                raise ConfigError(
                    f"the number of processes must be a multiple of {unit} ({product} parallel sizes), "
                    f"got {world_size}: start {near}"
                )
        return world_size // self.model_parallel_size


def initialize(parallel: ParallelConfig | None = None, *, seed: int = 1234, timeout: float = 600.0) -> ParallelConfig:
    """Join the other processes and build the groups of Megatron-Core; a second call with the same layout does nothing.

    Works under `torchrun` and in a process started by hand, which becomes a world of one. An existing default process
    group is used as it is.

    Args:
        parallel: layout; one copy of the model per rank when not given.
        seed: seed of the random numbers of torch and of Megatron's generators.
        timeout: seconds after which a collective that is waiting for another rank gives up.

    Returns:
        The layout in use.

    Raises:
        ConfigError: if the layout does not fit the number of processes or another one is in use.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel = parallel or ParallelConfig()
    if parallel_state.model_parallel_is_initialized():
        _check_same_layout(parallel)
        return parallel
    launched = platform.launch()
    parallel.data_parallel_size(dist.get_world_size() if dist.is_initialized() else launched.world_size)
    if platform.cuda_available():
        torch.cuda.set_device(platform.device())
    if not dist.is_initialized():
        limit = timedelta(seconds=timeout)
        if launched.from_launcher:
            store, rank, world_size = next(rendezvous("env://", timeout=limit))
            store = fresh_store(store, rank, world_size, limit)
        else:
            store, rank, world_size = torch._C._distributed_c10d.HashStore(), 0, 1
        dist.init_process_group(platform.backend(), timeout=limit, store=store, rank=rank, world_size=world_size)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        distributed_timeout_minutes=max(1, round(timeout / 60)),
    )
    model_parallel_cuda_manual_seed(seed)
    # Stages draw the weights of different layers; ranks of one stage must draw alike. (Last: without a GPU Megatron's
    # seed goes to the same generator.)
    torch.manual_seed(seed + 100 * parallel_state.get_pipeline_model_parallel_rank())
    return parallel


def _check_same_layout(parallel: ParallelConfig) -> None:
    from megatron.core import parallel_state

    in_use = {
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
    }
    for name, size in in_use.items():
        wanted = getattr(parallel, name)
        if name == "expert_tensor_parallel_size":
            wanted = parallel.expert_tensor_size
        if wanted != size:
            raise ConfigError(
                f"parallel.{name}={wanted} was asked for, "
                f"but this process already runs with {size}: call shutdown() first"
            )


def shutdown() -> None:
    """Leave all groups; `initialize` may be called again afterwards."""
    from megatron.core import parallel_state

    from parrot_sys.megatron.runtime.compat import forget_moe_losses

    parallel_state.destroy_model_parallel()
    # Megatron forgets some groups, and what is left of a model may refer to others in circles. A process forked from
    # this one would drop them later and wait for their threads, which exist only here.
    for name, value in list(vars(parallel_state).items()):
        if isinstance(value, dist.ProcessGroup):
            setattr(parallel_state, name, None)
    forget_moe_losses()
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()
