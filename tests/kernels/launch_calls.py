"""Launches a small kernel several ways and prints what reached the launcher; a program, since it compiles for sm_90.

Each call is made three times: the first one goes through Triton, the others straight to the compiled code. The last is
that of a `Launch` which is kept, and which calls with other tensors share.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime.driver import driver

from parrot_kernels import compile_only, launches
from parrot_kernels.tile_choice import Tile

SEEN: list[list[str]] = []
SCRATCH: list[torch.Tensor | None] = []


class Launcher(compile_only.SilentLauncher):
    """Notes grid, code, and arguments."""

    def __init__(self, source: Any, metadata: Any) -> None:
        super().__init__(source, metadata)

        def note(*args: Any) -> None:
            grid, function, (enter, _), arguments = args[:3], args[4], args[11:13], args[13:]
            flags = *args[5:7], *args[8:10]
            SCRATCH.append(args[7])
            if enter is not None:
                enter(args[10])
            named = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in arguments]
            SEEN.append(list(map(repr, (grid, function, flags, *named))))

        self.launch = note


@triton.jit(do_not_specialize=["rows", "first"])
def kernel(x_ptr, y_ptr, rows, first, width, scale, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    at = first + tl.program_id(0).to(tl.int64) * width + tl.arange(0, BLOCK)
    if y_ptr is not None:
        tl.store(y_ptr + at, scale * tl.load(x_ptr + at, mask=at < rows, other=0.0), mask=at < rows)
    if WIDE:
        tl.store(x_ptr + at, 0.0, mask=at < rows)


@triton.jit
def copy_kernel(x_ptr, y_ptr, height, width, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK
    x_desc = tl.make_tensor_descriptor(x_ptr, [height, width], [width, 1], [BLOCK, BLOCK])
    y_desc = tl.make_tensor_descriptor(y_ptr, [height, width], [width, 1], [BLOCK, BLOCK])
    y_desc.store([row, 0], x_desc.load([row, 0]))


def report_scratch(silent: compile_only.CompileOnlyDriver) -> None:
    """Prints how much memory a kernel with descriptors gets from Triton, and which from its launches on two streams."""
    x, y = torch.zeros(64, 64), torch.zeros(64, 64)
    small = launches.Launch(copy_kernel, (4,), numbers=(64, 64), constants={"BLOCK": 16})
    large = launches.Launch(copy_kernel, (4, 2000), numbers=(64, 64), constants={"BLOCK": 16})
    SCRATCH.clear()
    for stream, launch in [(0, small), (0, small), (0, small), (1, small), (0, large), (0, large), (0, small)]:
        silent.get_current_stream = lambda device, stream=stream: stream  # type: ignore[method-assign]
        launch(x, y)
    print(json.dumps([None if own is None else [own.numel(), own.data_ptr()] for own in SCRATCH]), flush=True)


def main() -> None:
    silent = compile_only.CompileOnlyDriver(90)
    silent.launcher_cls = Launcher
    driver.set_active(silent)
    x, half, odd = torch.zeros(64), torch.zeros(64, dtype=torch.float16), torch.zeros(65)[1:]
    tiles = (Tile(sizes={"BLOCK": 16}, warps=1), Tile(sizes={"BLOCK": 32}))
    narrow, wide = {"WIDE": False}, {"WIDE": True}
    calls = {
        "plain": ((x, x), (7, 0, 48, 0.5), narrow, tiles[0]),
        "other rows": ((x, x), (16, 0, 48, 0.5), narrow, tiles[0]),
        "many rows": ((x, x), (2**31, 7, 48, 0.5), narrow, tiles[0]),
        "far rows": ((x, x), (7, 2**31, 48, 0.5), narrow, tiles[0]),
        "width of 1": ((x, x), (7, 0, 1, 0.5), narrow, tiles[0]),
        "odd width": ((x, x), (7, 0, 47, 0.5), narrow, tiles[0]),
        "scale of 1": ((x, x), (7, 0, 48, 1), narrow, tiles[0]),
        "scale of 1.0": ((x, x), (7, 0, 48, 1.0), narrow, tiles[0]),
        "no y": ((x, None), (7, 0, 48, 0.5), narrow, tiles[0]),
        "other dtype": ((half, x), (7, 0, 48, 0.5), narrow, tiles[0]),
        "other address": ((odd, x), (7, 0, 48, 0.5), narrow, tiles[0]),
        "other constant": ((x, x), (7, 0, 48, 0.5), wide, tiles[0]),
        "other tile": ((x, x), (7, 0, 48, 0.5), narrow, tiles[1]),
    }

    @launches.planned
    def plan(numbers: tuple[int, int, int], scale: float, tile: Tile, wide: bool) -> launches.Launch:
        constants = {"WIDE": wide}
        return launches.Launch(kernel, (3, 2), tile, tiles, numbers=(*numbers, scale), constants=constants)

    for name, (tensors, numbers, constants, tile) in calls.items():
        # What Triton itself launches; what the first launch launches, and the next ones, which compile nothing.
        kernel[(3, 2)](*tensors, *numbers, **constants, **tile.options)
        wanted = SEEN.pop()
        before = len(launches._ready)
        for _ in range(2):
            launches.launch(kernel, (3, 2), tile, tiles)(*tensors, *numbers, **constants)
        kept = plan(numbers[:3], numbers[3], tile, constants["WIDE"])
        kept(*tensors)
        heard: list[Any] = []
        knobs.runtime.launch_enter_hook.add(heard.append)
        kept(*tensors)
        knobs.runtime.launch_enter_hook.remove(heard.append)
        row = {"name": name, "wanted": wanted, "seen": SEEN[:], "kept": len(launches._ready) - before}
        print(json.dumps({**row, "hooks": len(heard)}), flush=True)
        SEEN.clear()
    report_scratch(silent)


if __name__ == "__main__":
    main()
