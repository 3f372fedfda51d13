"""A pytest plugin for Megatron-LM's own tests: on CPU processes (gloo), with our router and experts where SWAP says so.

The tests ask for GPUs and for eight processes. Here `parrot_sys`' CPU layer answers for the GPUs, and sizes of layouts
are cut to the processes that there are. Environment: SWAP (`experts` puts both our parts into every MoELayer; empty:
the peer's own), SWIGLU (configurations have the experts that ours are: SwiGLU without biases), REPORT (a file for
one JSON line a test).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import gc
import importlib
import inspect
import json
import os
import sys
import types
import typing
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import typing_extensions

from parrot_sys.megatron.runtime import cpu_layer

if not hasattr(typing, "override"):  # of Python 3.12, which release 0.19 asks for
    typing.override = typing_extensions.override  # type: ignore[attr-defined]
PROCESSES, RANK = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
PATIENCE = datetime.timedelta(seconds=90)
sys.path.insert(0, os.getcwd())


def on_cpu() -> Any:
    """The CPU layer for all of Megatron and for the tests, which call torch as well."""
    cpu_layer.widen()
    finder: Any = next(each for each in sys.meta_path if isinstance(each, cpu_layer._Finder))
    cuda = finder.stand_in(torch.cuda)
    cuda.manual_seed_all = cuda.manual_seed
    cuda.device = lambda *_: contextlib.nullcontext()
    cuda.FloatTensor = torch.FloatTensor

    def plain(to: Callable[..., Any]) -> Callable[..., Any]:
        def moved(self: Any, *args: Any, **kwargs: Any) -> Any:
            places = tuple(torch.device("cpu") if cpu_layer._is_cuda(each) else each for each in args)
            if cpu_layer._is_cuda(kwargs.get("device")):
                kwargs["device"] = torch.device("cpu")
            return to(self, *places, **kwargs)

        return moved

    for owner in (torch.Tensor, torch.nn.Module):
        owner.to = plain(owner.to)  # type: ignore[method-assign]
    return finder


def cut_sizes(tensor: int, context: int, experts: int, expert_tensor: int | None) -> tuple[int, int, int, int]:
    """Sizes for eight GPUs -> for the processes here."""
    tensor = min(tensor, PROCESSES)
    context = 1 if tensor * context > PROCESSES and tensor > 1 else min(context, PROCESSES)
    expert_tensor = tensor if expert_tensor is None else min(expert_tensor, PROCESSES)
    if experts > 1 and expert_tensor > 1 and expert_tensor * experts > PROCESSES:
        experts = 1
    return tensor, context, min(experts, PROCESSES), expert_tensor


SIZES = (
    "tensor_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)


def fewer_processes(parallel_state: Any, config_class: Any) -> None:
    """Layouts and configurations with sizes that fit."""
    initialize = parallel_state.initialize_model_parallel

    @functools.wraps(initialize)
    def fitting(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(initialize).bind(*args, **kwargs)
        bound.apply_defaults()
        given = dict(bound.arguments)
        given.update(zip(SIZES, cut_sizes(*(given[name] for name in SIZES)), strict=True))
        return initialize(**given | {"distributed_timeout_minutes": 2})

    parallel_state.initialize_model_parallel = fitting

    def cut(config: Any) -> None:
        for name, size in zip(SIZES, cut_sizes(*(getattr(config, name) for name in SIZES)), strict=True):
            setattr(config, name, size)
        if config.tensor_model_parallel_size == 1:
            config.sequence_parallel = False
        if os.environ.get("SWIGLU") and config.num_moe_experts:
            config.gated_linear_unit, config.activation_func = True, F.silu
            config.add_bias_linear = config.bias_activation_fusion = False

    before_init(config_class, cut)


def before_init(config_class: Any, change: Callable[[Any], None]) -> None:
    """Changes each configuration before it is checked."""
    check = config_class.__post_init__

    def __post_init__(self: Any) -> None:
        change(self)
        check(self)

    config_class.__post_init__ = __post_init__


def own_groups(utilities: Any, parallel_state: Any) -> None:
    """Process groups by gloo that end with each test, however it ended."""
    stores: list[dist.TCPStore] = []
    count = 0
    start, destroy = dist.init_process_group, utilities.Utils.destroy_model_parallel

    def initialize_distributed() -> None:
        nonlocal count
        if not dist.is_initialized():
            if not stores:
                port = int(os.environ["MASTER_PORT"]) + 1
                stores.append(dist.TCPStore("127.0.0.1", port, PROCESSES, RANK == 0))
            count += 1
            store = dist.PrefixStore(f"run{count}", stores[0])
            start("gloo", store=store, rank=RANK, world_size=PROCESSES, timeout=PATIENCE)
        utilities.Utils.inited = True

    def destroy_model_parallel() -> None:
        if not utilities.Utils.inited:
            return
        destroy()
        for name, value in list(vars(parallel_state).items()):
            if isinstance(value, dist.ProcessGroup):
                setattr(parallel_state, name, None)
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()

    utilities.Utils.initialize_distributed = staticmethod(initialize_distributed)
    utilities.Utils.destroy_model_parallel = staticmethod(destroy_model_parallel)
    dist.init_process_group = lambda backend=None, *args, **kwargs: start(
        "gloo", *args, **{**kwargs, "timeout": PATIENCE}
    )


def swap_parts() -> None:
    """Our router and experts in every MoELayer."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from parrot_sys.megatron import GroupedExperts, TokenRouter

    build = MoELayer.__init__

    def __init__(self: Any, config: Any, submodules: Any = None, *args: Any, **kwargs: Any) -> None:
        ours = dataclasses.replace(submodules, router=TokenRouter, experts=GroupedExperts)
        build(self, config, ours, *args, **kwargs)

    MoELayer.__init__ = __init__


FINDER = on_cpu()
_no_download = types.ModuleType("tests.test_utils.python_scripts.download_unit_tests_dataset")
_no_download.download_and_extract_asset = lambda *_, **__: None  # type: ignore[attr-defined]
sys.modules[_no_download.__name__] = _no_download
importlib.import_module("megatron.core.utils").is_te_min_version = lambda *_, **__: False
utilities = importlib.import_module("tests.unit_tests.test_utilities")
FINDER.adapt(utilities)
parallel_state = importlib.import_module("megatron.core.parallel_state")
fewer_processes(
    parallel_state, importlib.import_module("megatron.core.transformer.transformer_config").TransformerConfig
)
own_groups(utilities, parallel_state)
if os.environ.get("SWAP") == "experts":
    swap_parts()

_real = {name: getattr(torch.cuda, name) for name in ("is_available", "get_device_capability")}


def pytest_configure(config: pytest.Config) -> None:
    """Marks such as skipif, and what modules ask when they are imported, are answered as on a machine with GPUs."""
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda *_: (10, 0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Test files call torch as Megatron does."""
    for module in {item.module for item in items if isinstance(item, pytest.Function)}:
        FINDER.adapt(module)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Whoever asks from here on hears the truth."""
    for name, function in _real.items():
        setattr(torch.cuda, name, function)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One line for each test of this process."""
    if report.when == "call" or report.outcome != "passed":
        with open(f"{os.environ['REPORT']}.{RANK}", "a", encoding="utf-8") as file:
            line = [report.nodeid, report.when, report.outcome, str(report.longrepr or "")[-1500:]]
            file.write(json.dumps(line) + "\n")
