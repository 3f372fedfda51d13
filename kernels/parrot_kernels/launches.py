"""Launches of Triton kernels: all tile sizes compiled at the first one, and little host time for those that follow.

Triton's own way to a kernel that is compiled looks at every argument through several layers, which takes several times
as long as the launch itself. A `Launch` holds all but the tensors; made once for some sizes (`planned`) and called
often, it looks at addresses and dtypes and goes straight to the code.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import JITFunction
from triton.runtime.driver import driver

from parrot_kernels import triton_support
from parrot_kernels.stream_memory import scratch_of
from parrot_kernels.tile_choice import Tile, Tiles

# How compiled code is called is no public interface of Triton: elsewhere its own way is taken.
_DIRECT = triton.__version__.startswith("3.6.") and not triton_support.INTERPRETING
_MOST_READY = 4096

_Code = Callable[["Launch"], Callable[..., None]]

_ready: dict[tuple[Any, ...], _Code] = {}
_compiled: set[Any] = set()
_RUNTIME = knobs.runtime
_layouts: dict[int, tuple[int, tuple[bool, ...]]] = {}

# Decorator of functions that make plans of launches from sizes, and from nothing else: equal sizes share a plan.
# (typed: to Triton 1 and 1.0 are arguments of different kernels)
planned = functools.lru_cache(_MOST_READY, typed=True)


class Launch:
    """A kernel on a grid, with its numbers and constants, to be called with its tensors (or None), which come first.

    With `tile`, one of `tiles`, in that size. The first launch for some dtypes and widths compiles the other tiles too:
    a later shape that takes another tile must not wait for the compiler, least of all while a graph is captured.
    """

    __slots__ = ("_bound", "_constants", "_hooks", "_tile", "_tiles", "grid", "kernel", "numbers")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        tile: Tile | None = None,
        tiles: Tiles = (),
        *,
        numbers: tuple[Any, ...] = (),
        constants: Mapping[str, Any] | None = None,
    ) -> None:
        self.kernel, self.grid, self.numbers = kernel, grid, numbers
        self._tile, self._tiles, self._constants = tile, tiles, dict(constants or {})
        self._bound: dict[tuple[Any, ...], Callable[..., None]] = {}  # by device and dtypes
        self._hooks: list[Any] = kernel.pre_run_hooks

    def __call__(self, *tensors: Tensor | None) -> None:
        """Enqueues it on the current stream."""
        # (Hooks: somebody wants to hear of launches, a profiler, say.)
        if not _DIRECT or _RUNTIME.launch_enter_hook.calls or _RUNTIME.launch_exit_hook.calls or self._hooks:
            self._through_triton(tensors)
            return
        addresses = 0
        dtypes: list[torch.dtype | None] = []
        for tensor in tensors:
            if tensor is None:
                dtypes.append(None)
            else:
                addresses |= tensor.data_ptr()
                dtypes.append(tensor.dtype)
        if addresses % 16:  # rare, and code of its own
            self._through_triton(tensors)
            return
        active = driver.active
        device = active.get_current_device()
        start = self._bound.get((device, *dtypes))
        if start is None:
            start = self._bind((device, *dtypes), tensors)
        start(active.get_current_stream(device), tensors)

    @property
    def options(self) -> dict[str, Any]:
        """Constants by name, those of the tile too."""
        return self._constants if self._tile is None else {**self._constants, **self._tile.options}

    def _bind(self, key: tuple[Any, ...], tensors: tuple[Tensor | None, ...]) -> Callable[..., None]:
        """What starts the code for these tensors; looked up, or compiled and launched by Triton."""
        full = (*self._key(), *key)
        code = _ready.get(full)
        if code is None:
            compiled = self._through_triton(tensors)
            if compiled is None:  # a compile hook skipped it
                return _nothing
            if len(_ready) >= _MOST_READY:
                _ready.clear()
            _ready[full] = code = _code(self, compiled, tensors)
            self._bound[key] = code(self)
            return _nothing  # it has been launched
        start = self._bound[key] = code(self)
        return start

    def _key(self) -> tuple[Any, ...]:
        """Equal for launches of the same code with the same dtypes and aligned addresses.

        Triton compiles for dtypes, for numbers that are 1 or multiples of 16, and for addresses that are multiples of
        16. Numbers that differ from step to step are not specialised (`do_not_specialize`); beyond 32 bits they have
        code of their own, which is rare.
        """
        _, free = _layout(self.kernel)
        numbers = [
            None if own and -(2**31) <= number < 2**31 else (type(number), number)
            for own, number in zip(free, self.numbers, strict=True)
        ]
        constants = self._constants
        return (id(self.kernel), self._tile, *constants, *constants.values(), *numbers)

    def _through_triton(self, tensors: tuple[Tensor | None, ...]) -> Any:
        """Launches the way that Triton does, and returns the compiled kernel if there is one."""
        args, options, kernel = (*tensors, *self.numbers), self.options, self.kernel
        if triton_support.INTERPRETING:
            return kernel[self.grid](*args, **options)
        triton.set_allocator(_allocator(_device(tensors)))
        compiled = kernel[self.grid](*args, **options)
        if len(self._tiles) > 1 and compiled not in _compiled:
            for other in self._tiles:
                own = compiled
                if other is not self._tile:
                    own = kernel.warmup(*args, **self._constants, **other.options, grid=self.grid)
                if own is not None:  # None: a compile hook skipped it
                    own.run  # noqa: B018 - loads the code onto the device, which Triton puts off until a launch
                    _compiled.add(own)
        return compiled


def launch(kernel: Any, grid: tuple[int, ...], tile: Tile | None = None, tiles: Tiles = ()) -> Callable[..., None]:
    """As `Launch`, to be called once with tensors, numbers, and constants by name."""

    def call(*args: Any, **constants: Any) -> None:
        count = sum(arg is None or isinstance(arg, Tensor) for arg in args)
        Launch(kernel, grid, tile, tiles, numbers=args[count:], constants=constants)(*args[:count])

    return call


def _nothing(stream: Any, tensors: tuple[Tensor | None, ...]) -> None:
    """For a launch that is done."""


def _device(tensors: tuple[Tensor | None, ...]) -> torch.device:
    """Where the tensors are."""
    return next(tensor.device for tensor in tensors if tensor is not None)


@functools.cache
def _allocator(device: torch.device) -> Callable[[int, int, Any], Tensor]:
    """Of the scratch memory that a kernel's descriptors need, which Triton asks of the host at each launch."""
    return lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device)


def _layout(kernel: JITFunction[Any]) -> tuple[int, tuple[bool, ...]]:
    """How many tensors (or None) come first, and of each number whether it is not specialised."""
    layout = _layouts.get(id(kernel))  # (the hash of a kernel is that of its source)
    if layout is None:
        params = [param for param in kernel.params if not param.is_constexpr]
        pointers = [param.name.endswith("_ptr") for param in params]
        count = sum(pointers)
        assert all(pointers[:count]), f"{kernel.__name__}: pointers, named *_ptr, come first"
        layout = _layouts[id(kernel)] = count, tuple(param.do_not_specialize for param in params[count:])
    return layout


def _code(first: Launch, compiled: Any, tensors: tuple[Tensor | None, ...]) -> _Code:
    """What binds `compiled` to launches of it with other grids and numbers: what `compiled.run` does, without hooks."""
    params, count = first.kernel.params, len(tensors) + len(first.numbers)
    by_name = [param.is_constexpr for param in params]
    wanted = [False] * count + [True] * (len(params) - count)
    assert by_name == wanted, "arguments are given by position, constants by name"
    assert _layout(first.kernel)[0] == len(tensors), "all tensors are given"
    options = first.options
    rest = tuple(options.get(param.name, param.default) for param in params[count:])
    launcher, function, device = compiled.run, compiled.function, _device(tensors)
    hooks = (compiled.packed_metadata, None, None, None)
    flags = launcher.launch_cooperative_grid, launcher.launch_pdl

    def bind(own: Launch) -> Callable[..., None]:
        grid, tail = (*own.grid, *_ONES[len(own.grid)]), (*own.numbers, *rest)
        if launcher.profile_scratch_size:
            return lambda stream, tensors: launcher(*grid, stream, function, *hooks, *tensors, *tail)
        size, start = math.prod(grid) * launcher.global_scratch_size * launcher.num_ctas, launcher.launch

        def call(stream: Any, tensors: tuple[Tensor | None, ...]) -> None:
            scratch = scratch_of(size, device, stream) if size else None
            start(*grid, stream, function, *flags, scratch, None, *hooks, *tensors, *tail)

        return call

    return bind


_ONES: dict[int, tuple[int, ...]] = {1: (1, 1), 2: (1,), 3: ()}
