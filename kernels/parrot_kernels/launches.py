"""Launches of Triton kernels: all tile sizes compiled at the first one, and little host time for those that follow.

Triton's own way to a kernel that is compiled looks at every argument through several layers, which takes several times
as long as the launch itself. Here a launch with the dtypes and constants of an earlier one goes straight to the code.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import JITFunction
from triton.runtime.driver import driver

from parrot_kernels import triton_support
from parrot_kernels.tile_choice import Tile, Tiles

# How compiled code is called is no public interface of Triton: elsewhere its own way is taken.
_DIRECT = triton.__version__.startswith("3.6.") and not triton_support.INTERPRETING
_MOST_READY = 4096

_Numbers = Callable[[tuple[Any, ...]], tuple[Any, ...]]

_ready: dict[tuple[Any, ...], Callable[..., None]] = {}
_compiled: set[Any] = set()
_layouts: dict[int, tuple[int, _Numbers, _Numbers]] = {}


def launch(kernel: Any, grid: tuple[int, ...], tile: Tile | None = None, tiles: Tiles = ()) -> Callable[..., None]:
    """`kernel` on `grid`, to be called with its arguments by position and its constants by name.

    With `tile`, one of `tiles`, in that size. The first launch for some dtypes and widths compiles the other tiles too:
    a later shape that takes another tile must not wait for the compiler, least of all while a graph is captured.
    """

    def call(*args: Any, **constants: Any) -> None:
        key = None
        if _DIRECT and isinstance(kernel, JITFunction) and not _hooked(kernel):
            active = driver.active
            device = active.get_current_device()
            key = _key(kernel, device, tile, args, constants)
            if key in _ready:
                _ready[key](grid, active.get_current_stream(device), args)
                return
        options = constants if tile is None else {**constants, **tile.options}
        if not triton_support.INTERPRETING:
            triton.set_allocator(_allocator(_device(args)))
        compiled = kernel[grid](*args, **options)
        if triton_support.INTERPRETING:
            return
        if len(tiles) > 1 and compiled not in _compiled:
            for other in tiles:
                own = compiled if other is tile else kernel.warmup(*args, **constants, **other.options, grid=grid)
                if own is not None:  # None: a compile hook skipped it
                    own.run  # noqa: B018 - loads the code onto the device, which Triton puts off until a launch
                    _compiled.add(own)
        if key is not None and compiled is not None:
            if len(_ready) >= _MOST_READY:
                _ready.clear()
            _ready[key] = _direct(kernel, compiled, args, options)

    return call


def _device(args: tuple[Any, ...]) -> torch.device:
    """Where the arguments are."""
    return next(arg.device for arg in args if isinstance(arg, Tensor))


@functools.cache
def _allocator(device: torch.device) -> Callable[[int, int, Any], Tensor]:
    """Of the scratch memory that a kernel's descriptors need, which Triton asks of the host at each launch."""
    return lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device)


def _hooked(kernel: JITFunction[Any]) -> bool:
    """Whether somebody wants to hear of launches: a profiler, say."""
    runtime = knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls or kernel.pre_run_hooks)


def _key(
    kernel: JITFunction[Any], device: int, tile: Tile | None, args: tuple[Any, ...], constants: dict[str, Any]
) -> tuple[Any, ...] | None:
    """Equal for launches of the same compiled code; None where Triton has to look itself.

    Triton compiles for dtypes, for numbers that are 1 or multiples of 16, and for addresses that are multiples of 16.
    Other addresses are rare, and numbers that differ from step to step are not specialised (`do_not_specialize`).
    """
    layout = _layouts.get(id(kernel))  # (the hash of a kernel is that of its source)
    if layout is None:
        layout = _layouts[id(kernel)] = _layout(kernel)
    pointers, fixed_of, free_of = layout
    tensors = args[:pointers]
    addresses = 0
    for tensor in tensors:
        if tensor is not None:
            addresses |= tensor.data_ptr()
    if addresses % 16:
        return None
    dtypes: list[Any] = [None if tensor is None else tensor.dtype for tensor in tensors]
    for number in free_of(args):
        if not -(2**31) <= number < 2**31:
            dtypes.append(number)  # a kernel of its own, and rare
    return (id(kernel), device, tile, *constants, *constants.values(), *dtypes, *fixed_of(args))


def _layout(kernel: JITFunction[Any]) -> tuple[int, _Numbers, _Numbers]:
    """How many tensors (or None) come first, and what picks from the arguments the numbers that are specialised, and
    those that are not."""
    params = [param for param in kernel.params if not param.is_constexpr]
    pointers = [param.name.endswith("_ptr") for param in params]
    count = sum(pointers)
    assert all(pointers[:count]), f"{kernel.__name__}: pointers, named *_ptr, come first"
    numbers = range(count, len(params))
    return count, *(_picker([i for i in numbers if params[i].do_not_specialize is free]) for free in (False, True))


def _picker(positions: list[int]) -> _Numbers:
    if len(positions) > 1:
        return itemgetter(*positions)
    return lambda args: tuple(args[position] for position in positions)


def _direct(
    kernel: JITFunction[Any], compiled: Any, args: tuple[Any, ...], options: dict[str, Any]
) -> Callable[..., None]:
    """Launches `compiled` on a grid and a stream with arguments as `args`; what `compiled.run` does, without hooks."""
    params = kernel.params
    by_name = [param.is_constexpr for param in params]
    wanted = [False] * len(args) + [True] * (len(params) - len(args))
    assert by_name == wanted, "arguments are given by position, constants by name"
    rest = tuple(options.get(param.name, param.default) for param in params[len(args) :])
    launcher, function = compiled.run, compiled.function
    hooks = (compiled.packed_metadata, None, None, None)
    if launcher.profile_scratch_size:

        def through_triton(grid: tuple[int, ...], stream: Any, args: tuple[Any, ...]) -> None:
            launcher(*grid, *_ONES[len(grid)], stream, function, *hooks, *args, *rest)

        return through_triton
    flags = launcher.launch_cooperative_grid, launcher.launch_pdl
    size = launcher.global_scratch_size * launcher.num_ctas
    start, device = launcher.launch, _device(args)

    def call(grid: tuple[int, ...], stream: Any, args: tuple[Any, ...]) -> None:
        scratch = torch.empty(math.prod(grid) * size, dtype=torch.int8, device=device) if size else None
        start(*grid, *_ONES[len(grid)], stream, function, *flags, scratch, None, *hooks, *args, *rest)

    return call


_ONES: dict[int, tuple[int, ...]] = {1: (1, 1), 2: (1,), 3: ()}
