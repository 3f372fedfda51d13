"""Operators of PyTorch's dispatcher, as `torch.library.custom_op` makes them, at less than half its host time.

`custom_op` looks at every argument of every call again: it tells outputs that alias inputs from others, sorts keyword
arguments and goes through a generated autograd function, 35 us forward and 80 us backward on a CPU on which these take
16 and 34. Operators here have positional arguments only, and that they mutate and alias nothing is proven by
`torch.library.opcheck` in the tests, not at each call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn import Parameter

_LIBRARY = torch.library.Library("parrot", "FRAGMENT")

_PLAIN = (Tensor, Parameter)
# Arguments of these types alone are the usual case, which one look at their types tells.
_UNWATCHED = frozenset({*_PLAIN, type(None), bool, int, float, str, list, tuple})

SetupContext = Callable[[Any, tuple[Any, ...], Any], None]


class Operator:
    """`parrot::<name>` with the signature of a function of tensors and numbers, which must have annotations."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._name = name
        self._function = _eager(function)
        self._setup_context: SetupContext | None = None
        self._backward: Callable[..., Any] = self._refuse
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        _LIBRARY.impl(name, self._function, "CompositeExplicitAutograd")
        self._overload: Any = getattr(torch.ops.parrot, name).default
        self._differentiable = self._autograd_function(self._function)
        dispatched = self._autograd_function(self._below_autograd)
        _LIBRARY.impl(name, lambda *args: self._with_gradients(self._below_autograd, dispatched, args), "Autograd")

    def __call__(self, *args: Any) -> Any:
        # Where nobody listens the function itself is called: entering the dispatcher takes longer than many kernels.
        if not (torch.compiler.is_compiling() or _is_watched(args)):
            return self._with_gradients(self._function, self._differentiable, args)
        if torch.is_grad_enabled():
            return self._overload(*args)
        return self._below_autograd(*args)

    @staticmethod
    def _with_gradients(run: Callable[..., Any], differentiable: Any, args: tuple[Any, ...]) -> Any:
        """Through the autograd function where a gradient is wanted, else by `run`."""
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return differentiable.apply(*args)
        return run(*args)

    def _below_autograd(self, *args: Any) -> Any:
        if not (torch.compiler.is_compiling() or _is_watched(args)):
            return self._function(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return self._overload(*args)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator of a function that gives outputs without values, for tracing."""
        return torch.library.register_fake(f"parrot::{self._name}", function, lib=_LIBRARY)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: SetupContext) -> None:
        """Gives the operator gradients; the functions are those of a `torch.autograd.Function`."""
        self._backward, self._setup_context = backward, setup_context

    def _refuse(self, *_: Any) -> None:
        # Operators for inference alone, and gradients of gradients: refused as torch's custom_op does, not wrong.
        raise NotImplementedError(f"parrot::{self._name} has no autograd formula")

    def _autograd_function(self, run: Callable[..., Any]) -> Any:
        """The operator as a `torch.autograd.Function`, whose forward pass is `run`."""

        def forward(ctx: Any, *args: Any) -> Any:
            output = run(*args)
            if self._setup_context is not None:
                self._setup_context(ctx, args, output)
            return output

        def backward(ctx: Any, *grads: Any) -> Any:
            return self._backward(ctx, *grads)

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        return type(f"parrot_{self._name}", (torch.autograd.Function,), methods)


def _is_watched(args: tuple[Any, ...]) -> bool:
    """Whether a dispatch mode, a transform or a kind of tensor wants to see the operator itself."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.maybe_current_level() is not None
        or not (_UNWATCHED.issuperset(map(type, args)) or _are_plain(args))
    )


def _are_plain(args: tuple[Any, ...]) -> bool:
    return all(type(arg) in _PLAIN for arg in args if isinstance(arg, Tensor))


def _eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` out of sight of torch.compile, also where it only compiles parts of the caller."""
    disabled: Callable[..., Any] = _disable_dynamo(function)

    def call(*args: Any) -> Any:
        return disabled(*args) if "torch._dynamo" in sys.modules else function(*args)

    return call


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Decorator: makes the function the operator `parrot::<name>`."""
    return lambda function: Operator(name, function)
