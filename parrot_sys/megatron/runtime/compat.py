"""The one place that knows how Megatron-Core 0.16.1 to 0.19.x differ and which of their lines need help on the CPU."""

from __future__ import annotations

import contextlib
import inspect
import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def _identity(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _adapt_jit(module: Any) -> None:
    # torch.compile would start a C++ compiler in the middle of the first training step.
    module.jit_fuser = _identity


def _adapt_random(module: Any) -> None:
    # The module binds private functions of torch.cuda by name, which the stand-ins cannot reach.
    module._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    module._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def _adapt_moe_utils(module: Any) -> None:
    # 0.16.1 uses the name without Transformer Engine, where it does not exist.
    if not hasattr(module, "te_general_gemm"):
        module.te_general_gemm = None


def _adapt_token_dispatcher(module: Any) -> None:
    # The original turns only CUDA tensors into NumPy arrays; the split sizes of gloo must be integers as well.
    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    module.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu


def _adapt_inference_communication(module: Any) -> None:
    module._is_cuda = lambda tensor: None


def _adapt_sharded_tensors(module: Any) -> None:
    # A default value holds the function that makes tensors from before it was redirected.
    module.ShardedTensor.init_data.__defaults__ = (module.torch.empty,)


_CPU_ADAPTERS: dict[str, Callable[[ModuleType], None]] = {
    "megatron.core.dist_checkpointing.mapping": _adapt_sharded_tensors,
    "megatron.core.jit": _adapt_jit,
    "megatron.core.tensor_parallel.random": _adapt_random,
    "megatron.core.transformer.moe.moe_utils": _adapt_moe_utils,
    "megatron.core.transformer.moe.token_dispatcher": _adapt_token_dispatcher,
    "megatron.core.inference.communication_utils": _adapt_inference_communication,
}


def adapt_for_cpu(module: ModuleType) -> None:
    """Adapts modules that need more than redirected CUDA calls; `cpu_layer` calls this after the import of each."""
    if adapter := _CPU_ADAPTERS.get(module.__name__):
        adapter(module)


def mlp_submodule(submodules: Any) -> Any:
    """The dense MLP as a submodule of `TransformerLayer`: a ModuleSpec up to 0.16, a builder since then."""
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.spec_utils import ModuleSpec

    if hasattr(MLP, "as_mlp_submodule"):
        import functools

        return functools.partial(MLP.as_mlp_submodule, submodules=submodules)
    return ModuleSpec(module=MLP, submodules=submodules)


def moe_submodules(mlp: Any) -> Any:
    """`MoESubmodules` of a layer spec's `mlp`, None without a MoELayer: a ModuleSpec up to 0.16, then a partial."""
    import functools

    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.spec_utils import ModuleSpec

    if isinstance(mlp, functools.partial):
        return mlp.keywords.get("submodules") if mlp.func is MoELayer else None
    return mlp.submodules if isinstance(mlp, ModuleSpec) and mlp.module is MoELayer else None


def with_moe_submodules(mlp: Any, submodules: Any) -> Any:
    """The same `mlp` with other `MoESubmodules`."""
    import dataclasses
    import functools

    if isinstance(mlp, functools.partial):
        return functools.partial(mlp.func, *mlp.args, **{**mlp.keywords, "submodules": submodules})
    return dataclasses.replace(mlp, submodules=submodules)


def forget_moe_losses() -> None:
    """Empties Megatron's log of auxiliary losses, which keeps the process groups that they were reduced over."""
    try:
        from megatron.core.transformer.moe import moe_logging
    except ImportError:  # up to 0.16
        from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

        get_moe_layer_wise_logging_tracker().clear()
    else:
        moe_logging._MOE_METRICS_TRACKER = None


def plan_save(state: dict[str, Any], folder: Path, strategy: Any) -> Any:
    """Megatron's request to write a sharded state dict, not started yet. A collective.

    Up to 0.16 the part that is equal on all ranks is written right here, unless `catch_common_state` is active.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # Results do not cross processes here. Megatron otherwise starts a helper process for them, which takes seconds at
    # the first save and hangs without psutil.
    if getattr(filesystem_async, "_results_queue", queue) is None:
        filesystem_async._results_queue = queue.Queue()
    known = inspect.signature(dist_checkpointing.save).parameters
    choice = {"async_strategy": "mcore"} if "async_strategy" in known else {}
    return dist_checkpointing.save(state, str(folder), sharded_strategy=strategy, async_sharded_save=True, **choice)


@contextlib.contextmanager
def catch_common_state() -> Iterator[dict[str, Any]]:
    """File name -> values that Megatron up to 0.16 would write on rank 0 alone, where a failure hangs the others.

    Later versions plan these values like tensors; nothing is caught then.
    """
    from megatron.core.dist_checkpointing.strategies import common

    caught: dict[str, Any] = {}
    if not hasattr(common, "TorchCommonSaveStrategy"):
        yield caught
        return
    from megatron.core.dist_checkpointing.strategies import base

    class Caught(common.TorchCommonSaveStrategy):
        def save_common(self, common_state_dict: Any, checkpoint_dir: Any) -> None:
            caught[common.COMMON_STATE_FNAME] = common_state_dict

    usual = base.get_default_strategy(base.StrategyAction.SAVE_COMMON, "torch", 1)
    base.register_default_strategy(base.StrategyAction.SAVE_COMMON, "torch", 1, Caught("torch", 1))
    try:
        yield caught
    finally:
        base.register_default_strategy(base.StrategyAction.SAVE_COMMON, "torch", 1, usual)


@contextlib.contextmanager
def replaced_readers(reader: Callable[..., Any], read_common: Callable[[Any], dict[str, Any]]) -> Iterator[None]:
    """Megatron opens checkpoints with `reader(folder, ...)`, and reads `common.pt` with `read_common(folder)`."""
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import common
    from megatron.core.dist_checkpointing.strategies import torch as torch_strategies

    places: list[tuple[Any, str, Any]] = [(torch_strategies, "_get_filesystem_reader", reader)]
    if hasattr(serialization, "_get_filesystem_reader"):  # since 0.19
        places.append((serialization, "_get_filesystem_reader", reader))
    if hasattr(serialization, "load_common"):  # since 0.17
        places.append((serialization, "load_common", read_common))
    else:
        strategy = common.TorchCommonLoadStrategy
        places.append((strategy, "load_common", lambda _, folder: read_common(folder)))
    before = [getattr(owner, name) for owner, name, _ in places]
    for owner, name, new in places:
        setattr(owner, name, new)
    try:
        yield
    finally:
        for (owner, name, _), old in zip(places, before, strict=True):
            setattr(owner, name, old)
