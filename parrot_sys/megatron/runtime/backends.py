"""Choice of the norms, linear layers and Adam of models: Transformer Engine's, apex's, or those that need neither.

Both accelerators are optional and serve CUDA only. All choices have the same parameters under the same names, so that a
checkpoint does not tell which one wrote it (`without_extra_state`). Transformer Engine's norms and linear layers are
taken where it is installed; of apex the fused LayerNorm, where Transformer Engine is not. A fused Adam of either is
Megatron-Core's own choice; `parrot_sys.megatron.runtime.adam` is the one that takes over when there is none.

Importing this module imports neither Megatron nor an accelerator.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from parrot_sys import platform

Backend = Literal["transformer_engine", "apex", "none"]

_device: ContextVar[torch.device | None] = ContextVar("device", default=None)
_without: ContextVar[bool] = ContextVar("without", default=False)


def transformer_engine() -> str | None:
    """Why Transformer Engine cannot be used on this machine; None when it can."""
    version = _version("transformer-engine")
    if version is None:
        return "not installed (pip install --no-build-isolation 'parrot_sys[te]', on CUDA machines only)"
    if _version("transformer-engine-torch") is None:
        return f"{version} is installed without its torch part; install transformer-engine[core_cu13,pytorch]"
    return _why_no_nvidia_gpu()


def apex() -> str | None:
    """Why NVIDIA's apex cannot be used on this machine; None when it can.

    It is told from the unrelated PyPI project of that name by what it contains.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "not installed (build it from NVIDIA's sources; the PyPI project `apex` is something else)"
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if not any((folder / "multi_tensor_apply").is_dir() for folder in folders):
        return "the installed `apex` is not NVIDIA's (it has no apex.multi_tensor_apply)"
    if importlib.util.find_spec("amp_C") is None:
        return "NVIDIA apex is installed without its C++ extensions (amp_C)"
    return _why_no_nvidia_gpu()


def _why_no_nvidia_gpu() -> str | None:
    if torch.version.hip is not None:
        return f"it needs a CUDA device, this torch is built for ROCm {torch.version.hip}"
    return None if platform.cuda_available() else "it needs a CUDA device"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@contextlib.contextmanager
def building_for(device: torch.device) -> Iterator[None]:
    """Within it, layers are chosen for a model that will run on `device`; otherwise for this process's own device."""
    token = _device.set(device)
    try:
        yield
    finally:
        _device.reset(token)


@contextlib.contextmanager
def without_accelerators() -> Iterator[None]:
    """Within it, models are built as on a machine that has neither Transformer Engine nor apex (for comparisons)."""
    token = _without.set(True)
    try:
        yield
    finally:
        _without.reset(token)


def norm_backend(normalization: str) -> Backend:
    """Back end of the norm, for "RMSNorm" or "LayerNorm"."""
    if not _on_cuda():
        return "none"
    if transformer_engine() is None:
        return "transformer_engine"
    # Megatron-Core's module around apex's kernels knows no RMSNorm.
    return "apex" if normalization == "LayerNorm" and apex() is None else "none"


def linear_backend() -> Backend:
    """Back end of the tensor-parallel linear layers."""
    return "transformer_engine" if _on_cuda() and transformer_engine() is None else "none"


def adam_backend() -> Backend:
    """Back end of the Adam in Megatron-Core's optimizers, which looks at what is installed, in this order."""
    if not platform.cuda_available():
        return "none"
    if transformer_engine() is None:
        return "transformer_engine"
    return "apex" if apex() is None else "none"


def _on_cuda() -> bool:
    device = _device.get() or platform.device()
    return device.type == "cuda" and not _without.get()


def fused_norm(normalization: str) -> Callable[..., nn.Module] | None:
    """Builder of an accelerated norm (arguments as for `norms.Norm`), None where there is none."""
    backend = norm_backend(normalization)
    if backend == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    if backend == "apex":
        from megatron.core.fusions.fused_layer_norm import FusedLayerNorm

        return FusedLayerNorm
    return None


def parallel_linear_layers() -> tuple[type[nn.Module], type[nn.Module]]:
    """Column-parallel and row-parallel linear layer."""
    if linear_backend() == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

        return TEColumnParallelLinear, TERowParallelLinear
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    return ColumnParallelLinear, RowParallelLinear


def in_use() -> dict[str, str]:
    """Back ends that models of this process are built of, for `parrot info`."""
    names = {"transformer_engine": "Transformer Engine", "apex": "apex"}
    return {
        "RMSNorm": names.get(norm_backend("RMSNorm"), "torch"),
        "LayerNorm": names.get(norm_backend("LayerNorm"), "torch"),
        "linear layers": names.get(linear_backend(), "Megatron-Core"),
        "Adam": names.get(adam_backend(), "parrot_sys"),
        "core attention": "parrot_sys",
        "experts and router": "parrot_sys",
    }


def without_extra_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """A (sharded) state dict without `_extra_state`.

    Some layers of Transformer Engine have one, others do not, Megatron's own keep an empty one; it holds FP8 scales,
    which no model here has. With it, checkpoints would depend on which layers wrote them.
    """
    return {name: value for name, value in state.items() if not name.endswith("_extra_state")}


def ignore_extra_state(_: Any, incompatible_keys: Any) -> None:
    """Hook for `register_load_state_dict_post_hook`: `_extra_state` is neither missing nor unexpected."""
    for keys in (incompatible_keys.missing_keys, incompatible_keys.unexpected_keys):
        keys[:] = [key for key in keys if not key.endswith("_extra_state")]
