"""Which back end runs an op: `parrot_kernels.<op>.{cuda,triton,cpu}_impl` or `.reference`, looked up at each call.

A back end exists when its file exists, so a new one is added by adding the file. `auto` takes the first, in the order
cuda > triton > cpu > reference, whose `why_not(*args)` is None, but never Triton's interpreter, which takes CPU tensors
and is there for tests; a forced one that cannot run raises with its reason.
The choice may depend on devices, dtypes and shapes, never on values.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from parrot_kernels import env

OPS = (
    "text_guided_routing",
    "topk_routing",
    "expert_mlp",
    "linear_cross_entropy",
    "router_attention",
    "segment_attention",
    "paged_attention",
    "few_rows_linear",
    "paged_layer",
    "grouped_gemm",
    "fp8_experts",
    "permute",
    "swiglu",
)
BACKENDS = ("cuda", "triton", "cpu", "reference")

_log = logging.getLogger(__name__)
# Not a ContextVar: autograd may run the backward pass on a thread of its own, which must see the same choice.
_forced: list[str] = []
_logged: set[tuple[str, str]] = set()


@functools.cache
def _backend(op: str, name: str) -> ModuleType | None:
    """The module of one back end, or None when the op has no such file."""
    module = f"parrot_kernels.{op}.{'reference' if name == 'reference' else f'{name}_impl'}"
    return importlib.import_module(module) if importlib.util.find_spec(module) else None


def _why_not(op: str, name: str, args: tuple[object, ...]) -> str | None:
    module = _backend(op, name)
    return f"{op} has no {name} back end" if module is None else module.why_not(*args)


def _on_cuda(args: tuple[object, ...]) -> bool:
    return any(isinstance(arg, torch.Tensor) and arg.is_cuda for arg in args)


def select(op: str, *args: object) -> ModuleType:
    """The module whose launchers run `op` on the forward arguments `args`.

    Raises:
        NotImplementedError: a forced back end (`force_backend`, PARROT_BACKEND) cannot run; the message has the reason.
        ValueError: PARROT_BACKEND names no back end.
    """
    name = _forced[-1] if _forced else env.backend()
    if name != "auto":
        if reason := _why_not(op, name, args):
            # Forcing is for comparing back ends: going on with another one would compare a back end with itself.
            raise NotImplementedError(f"{op}: the forced back end {name!r} cannot run: {reason}")
    else:
        names = BACKENDS if _on_cuda(args) else ("cpu", "reference")
        name = next(name for name in names if _why_not(op, name, args) is None)
    if (op, name) not in _logged:
        _logged.add((op, name))
        _log.info("%s runs on the %s back end", op, name)
    module = _backend(op, name)
    assert module is not None, f"{op}: {name} was chosen but has no module"
    return module


def runs_on(op: str, name: str, *args: object) -> bool:
    """Whether back end `name` can run `op` and nobody has forced another one."""
    return (_forced[-1] if _forced else env.backend()) in ("auto", name) and _why_not(op, name, args) is None


@contextmanager
def force_backend(name: str) -> Iterator[None]:
    """Every op called inside runs on back end `name` or raises NotImplementedError with the reason.

    Raises:
        ValueError: `name` is not one of BACKENDS.
    """
    if name not in BACKENDS:
        raise ValueError(f"back end must be one of {', '.join(BACKENDS)}, got {name!r}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def available() -> dict[str, dict[str, str | None]]:
    """For each op and back end None where it can run on this machine, else the reason why it cannot."""
    return {op: {name: _why_not(op, name, ()) for name in BACKENDS} for op in OPS}
