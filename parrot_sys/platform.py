"""Device, back end and launcher of this process: the one module that asks torch and the environment about them."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Literal

import torch

from parrot_sys.errors import ConfigError

DtypeName = Literal["float32", "bfloat16", "float16"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """Values that `torchrun` told this process; one process of one when it was started by hand."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    from_launcher: bool = False
    """Whether a launcher set up a rendezvous (`MASTER_ADDR`, `MASTER_PORT`)."""


def gpu_toolkit() -> str | None:
    """GPU toolkit that this torch is built for, `CUDA 13.0` or `ROCm 6.4`; None for a CPU build."""
    if torch.version.cuda is not None:
        return f"CUDA {torch.version.cuda}"
    return None if torch.version.hip is None else f"ROCm {torch.version.hip}"


@functools.cache
def cuda_available() -> bool:
    """Whether torch's `cuda` devices run here: NVIDIA GPUs, or AMD GPUs under ROCm, which go by the same name.

    Counts the devices through NVML where that is possible, which (unlike `torch.cuda.is_available`) leaves the CUDA
    driver of this process untouched, so that worker processes can still be forked afterwards.
    """
    return gpu_toolkit() is not None and torch.cuda.device_count() > 0


def wants_cpu_layer() -> bool:
    """Whether Megatron-Core may be redirected to the CPU where no GPU runs: unless `PARROT_CPU_LAYER` is 0."""
    value = os.environ.get("PARROT_CPU_LAYER", "1")
    if value not in ("0", "1"):
        raise ConfigError(f"PARROT_CPU_LAYER must be 0 or 1, got {value!r}")
    return value == "1"


def launch() -> Launch:
    """Rank, world size and local rank from the environment that `torchrun` sets."""
    if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        return Launch()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return Launch(
        rank=rank, world_size=world_size, local_rank=int(os.environ.get("LOCAL_RANK", rank)), from_launcher=True
    )


def device() -> torch.device:
    """Device of this process: the GPU of its local rank, else the CPU."""
    return torch.device("cuda", launch().local_rank) if cuda_available() else torch.device("cpu")


def parse_device(name: torch.device | str | None) -> torch.device:
    """`cpu`, `cuda` or `cuda:N` -> that device, when this machine has it; None -> `device()`.

    Raises:
        ConfigError: for any other name, or a GPU that is not there.
    """
    if name is None:
        return device()
    try:
        wanted = torch.device(name)
    except RuntimeError:
        wanted = None
    if wanted is None or wanted.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be cpu, cuda or cuda:N, got {str(name)!r}")
    gpus = torch.cuda.device_count() if cuda_available() else 0
    if wanted.type == "cuda" and not 0 <= (wanted.index or 0) < gpus:  # torch wraps large numbers to negative ones
        raise ConfigError(f"device must be one of this machine's {gpus} GPUs or cpu, got {str(name)!r}: use cpu")
    return wanted


def backend() -> Literal["nccl", "gloo"]:
    """Back end of the process groups on `device()`."""
    return "nccl" if cuda_available() else "gloo"


def parse_dtype(name: str) -> torch.dtype:
    """`float32`, `bfloat16` or `float16` -> torch dtype.

    Raises:
        ConfigError: for any other name.
    """
    if name not in _DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(_DTYPES)}, got {name!r}")
    return _DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """torch dtype -> its name in configurations (`bfloat16`)."""
    return str(dtype).removeprefix("torch.")


def api_key() -> str:
    """`PARROT_API_KEY`: a key that requests to `parrot serve` must bring; empty where none is asked for."""
    return os.environ.get("PARROT_API_KEY", "")


def set_cpu_threads() -> None:
    """Gives each process of a launcher its share of this machine's cores, unless OMP_NUM_THREADS is set.

    torchrun itself sets it to 1 where it starts several processes, so that this value is no wish of the user's there.
    """
    if not launch().from_launcher:
        return
    processes, wish = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), os.environ.get("OMP_NUM_THREADS")
    if wish is None or (wish == "1" and processes > 1):
        torch.set_num_threads(max(1, cores() // processes))


def single_thread_environment() -> dict[str, str]:
    """The environment for a program that works on one core: libraries and tokenizers start no threads there."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
