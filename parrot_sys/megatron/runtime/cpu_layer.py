"""Megatron-Core on machines without CUDA: its modules see a `torch` whose CUDA calls land on the CPU; nobody else does.

Megatron-Core writes `device="cuda"`, `torch.cuda.current_device()`, `.cuda()` and the like in many places. An import
hook gives each of its modules a stand-in for the names `torch`, `torch.cuda` and `torch.distributed` that redirects
exactly these calls. Because only module globals are replaced, a training step pays nothing for it (a
`TorchFunctionMode` costs microseconds in every torch call of the process) and other packages keep the real torch.

`install()` does nothing where a GPU runs, NVIDIA's or AMD's, and with `PARROT_CPU_LAYER=0`. It must come before the
first import of `megatron`, which `parrot_sys.megatron.__init__` makes sure of.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import logging
import sys
import time
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from parrot_sys import platform
from parrot_sys.megatron.runtime import compat

_log = logging.getLogger(__name__)

_CPU = torch.device("cpu")
_PACKAGES = ["megatron.core"]
"""Packages whose modules are adapted; `widen` adds to them."""
_FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "full", "full_like", "linspace", "ones", "ones_like"),
    *("rand", "randint", "randn", "tensor", "zeros", "zeros_like"),
)


class _Stream:
    """A stream on which everything has already happened."""

    device = _CPU
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, _: Any) -> None:
        pass

    def wait_event(self, _: Any) -> None:
        pass

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record()
        return event

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


class _Event:
    """A timing event that reads the host clock."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._seconds = 0.0

    def record(self, _: Any = None) -> None:
        self._seconds = time.perf_counter()

    def wait(self, _: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Event) -> float:
        return (other._seconds - self._seconds) * 1e3


class _StandIn(ModuleType):
    """A module that answers with its own attributes first and with those of the real module otherwise."""

    def __init__(self, real: ModuleType, **own: Any) -> None:
        super().__init__(real.__name__, real.__doc__)
        self.__dict__.update(own, _real=real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    def build(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return build


def _all_gather(tensors: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
    """`all_gather` that also takes rows of different counts, which gloo does not: padded to the longest."""
    if async_op or len({t.shape for t in tensors}) == 1:
        return dist.all_gather(tensors, tensor, group=group, async_op=async_op)
    longest = max(t.shape[0] for t in tensors)
    padded = tensor.new_zeros((longest, *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    gathered = [torch.empty_like(padded) for _ in tensors]
    dist.all_gather(gathered, padded, group=group)
    for out, rows in zip(tensors, gathered, strict=True):
        out.copy_(rows[: out.shape[0]])
    return None


def _reduce_scatter(
    output: torch.Tensor,
    inputs: list[torch.Tensor],
    op: Any = dist.ReduceOp.SUM,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """`reduce_scatter` that also takes rows of different counts, which gloo does not: all-reduced, then cut."""
    if async_op or len({t.shape for t in inputs}) == 1:
        return dist.reduce_scatter(output, inputs, op=op, group=group, async_op=async_op)
    total = torch.cat(inputs)
    dist.all_reduce(total, op=op, group=group)
    start = sum(t.shape[0] for t in inputs[: dist.get_rank(group)])
    output.copy_(total[start : start + output.shape[0]])
    return None


def _stand_ins() -> dict[int, ModuleType]:
    """id of the real module -> what Megatron sees in its place."""
    stream = _Stream()
    cuda = _StandIn(
        torch.cuda,
        current_device=lambda: _CPU,
        synchronize=_nothing,
        current_stream=lambda *_: stream,
        default_stream=lambda *_: stream,
        stream=lambda stream=None: contextlib.nullcontext(stream),
        set_stream=_nothing,
        Stream=_Stream,
        Event=_Event,
        get_rng_state=lambda *_, **__: torch.get_rng_state(),
        set_rng_state=lambda state, *_, **__: torch.set_rng_state(state),
        manual_seed=torch.default_generator.manual_seed,
        empty_cache=_nothing,
        is_current_stream_capturing=lambda: False,
        nvtx=SimpleNamespace(range_push=_nothing, range_pop=_nothing),
    )
    distributed = _StandIn(dist, all_gather=_all_gather, reduce_scatter=_reduce_scatter)
    factories = {name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}
    stand_in = _StandIn(torch, cuda=cuda, distributed=distributed, **factories)
    return {id(torch): stand_in, id(torch.cuda): cuda, id(dist): distributed}


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the normal import run and then swaps the names in each module of Megatron-Core."""

    def __init__(self) -> None:
        self._stand_ins = _stand_ins()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not _is_adapted(fullname):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(fullname, spec.loader.path, self)
        return spec

    def stand_in(self, real: ModuleType) -> ModuleType:
        """Module that Megatron sees in the place of a real one."""
        return self._stand_ins[id(real)]

    def adapt(self, module: ModuleType) -> None:
        for name, value in list(vars(module).items()):
            if (stand_in := self._stand_ins.get(id(value))) is not None:
                setattr(module, name, stand_in)
        compat.adapt_for_cpu(module)


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, fullname: str, path: str, finder: _Finder) -> None:
        super().__init__(fullname, path)
        self._finder = finder

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        self._finder.adapt(module)


def _for_megatron(real: Callable[..., Any], redirected: Callable[..., Any]) -> Callable[..., Any]:
    """A tensor method that is redirected when a module of Megatron-Core calls it, and the real one otherwise."""

    def method(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return (redirected if _is_adapted(caller) else real)(self, *args, **kwargs)

    return method


def _cuda_type(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """`tensor.type()` with the name it would have on a GPU: the optimizers of Megatron compare with these names."""
    if args or kwargs:
        return torch._C.TensorBase.type(tensor, *args, **kwargs)
    return torch._C.TensorBase.type(tensor).replace("torch.", "torch.cuda.", 1)


def _itself(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return tensor


def _is_adapted(name: str) -> bool:
    """Whether a module is of a package that the layer adapts."""
    return any(name == package or name.startswith(f"{package}.") for package in _PACKAGES)


def is_installed() -> bool:
    """Whether this process runs Megatron-Core through the layer."""
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


def install() -> None:
    """Prepares the import of Megatron-Core for the CPU and logs that; nothing where a GPU runs or when done before."""
    if platform.cuda_available() or is_installed() or not platform.wants_cpu_layer():
        return
    toolkit = platform.gpu_toolkit()
    # A torch for GPUs that sees none is worth a look; a CPU build is what its user chose.
    _log.log(
        logging.INFO if toolkit is None else logging.WARNING,
        "Megatron-Core runs on the CPU in this process, since torch %s; PARROT_CPU_LAYER=0 leaves it as it is",
        "is a CPU build" if toolkit is None else f"is built for {toolkit} but sees no GPU",
    )
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    for method, redirected in (
        ("cuda", _itself),
        ("pin_memory", _itself),
        ("record_stream", _nothing),
        ("type", _cuda_type),
    ):
        setattr(torch.Tensor, method, _for_megatron(getattr(torch.Tensor, method), redirected))
    for name, module in list(sys.modules.items()):
        if _is_adapted(name):
            finder.adapt(module)


def widen() -> None:
    """Adapts all of `megatron`, not its core alone, and answers as if there were a GPU for each process.

    For whole programs of Megatron-LM (`parrot_sys.megatron.run`): they ask for devices before they train. Nothing where
    the layer is not installed.
    """
    finder = next((finder for finder in sys.meta_path if isinstance(finder, _Finder)), None)
    if finder is None:
        return
    _PACKAGES.append("megatron")
    cuda: Any = finder.stand_in(torch.cuda)
    cuda.is_available = lambda: True
    cuda.device_count = lambda: platform.launch().world_size
    cuda.set_device = _nothing
    cuda.get_device_capability = lambda *_: (10, 0)
    cuda.get_device_properties = lambda *_: SimpleNamespace(major=10, minor=0, total_memory=0, name="cpu")
    for owner in (torch.nn.Module, torch.Tensor):  # the program itself, which nobody adapts, calls them as well
        changed: Any = owner
        changed.cuda = _itself
    for name, module in list(sys.modules.items()):
        if _is_adapted(name):
            finder.adapt(module)
