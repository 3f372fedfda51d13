"""Speed against size, and a roofline."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullFormatter

from benchmarks.gpu_suite.analysis import Ceilings, Timing

# One colour and mark for a contender, in every panel. (Eleven marks to twenty colours: pairs come again late.)
_MARKS = "osD^v<>PX*h"


def _styles(measured: list[Timing]) -> dict[str, tuple[str, str]]:
    names = sorted({timing.contender for timing in measured}, key=lambda name: (not _ours(measured, name), name))
    colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    return {name: (colours[i % len(colours)], _MARKS[i % len(_MARKS)]) for i, name in enumerate(names)}


def _ours(measured: list[Timing], contender: str) -> bool:
    return any(timing.ours for timing in measured if timing.contender == contender)


def _compute_bound(timing: Timing, limits: Ceilings) -> bool:
    return timing.cost.flops / limits.flops > timing.cost.bytes / limits.bytes


def speed(measured: list[Timing], limits: Ceilings, device: str, path: Path) -> None:
    """One panel for each op and pass: TFLOP/s against operations, or GB/s against bytes where memory is the limit."""
    measured = [timing for timing in measured if timing.op != "ceiling"]
    styles, panels = _styles(measured), sorted({(timing.op, timing.which) for timing in measured})
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(5.5 * columns, 3.6 * lines), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes.flat, panels, strict=False):
        members = [timing for timing in measured if (timing.op, timing.which) == panel]
        compute = sum(_compute_bound(timing, limits) for timing in members) * 2 > len(members)
        for name, (colour, mark) in styles.items():
            own = [timing for timing in members if timing.contender == name]
            sizes = [timing.cost.flops / 1e9 if compute else timing.cost.bytes / 1e6 for timing in own]
            speeds = [timing.tflops if compute else timing.gbytes_s for timing in own]
            if own:
                axis.plot(sizes, speeds, mark, color=colour, label=name, markersize=7 if own[0].ours else 5, alpha=0.8)
        axis.axhline(limits.flops / 1e12 if compute else limits.bytes / 1e9, color="0.5", linewidth=1, linestyle="--")
        axis.set(xscale="log", yscale="log", title=f"{panel[0]}, {panel[1]}")
        axis.set(xlabel="GFLOP" if compute else "MB that must be moved", ylabel="TFLOP/s" if compute else "GB/s")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize="x-small")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(f"Speed against size, {device} (dashed: ceiling)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def roofline(measured: list[Timing], limits: Ceilings, device: str, path: Path) -> None:
    """Our contenders: achieved TFLOP/s against operations for each byte that must be moved."""
    own = [timing for timing in measured if timing.ours and timing.op != "ceiling" and timing.cost.flops]
    figure, axis = plt.subplots(figsize=(9, 5.5), layout="constrained")
    intensities = [timing.cost.flops / timing.cost.bytes for timing in own] or [1.0]
    ridge = limits.flops / limits.bytes
    roof = np.geomspace(min(*intensities, ridge) / 2, max(*intensities, ridge) * 2, 200)
    axis.plot(roof, np.minimum(limits.flops, roof * limits.bytes) / 1e12, color="0.4", linewidth=1.5)
    for i, op in enumerate(sorted({timing.op for timing in own})):
        members = [timing for timing in own if timing.op == op]
        points = [timing.cost.flops / timing.cost.bytes for timing in members], [timing.tflops for timing in members]
        axis.plot(*points, _MARKS[i % len(_MARKS)], label=op, alpha=0.75)
    axis.set(xscale="log", yscale="log", xlabel="FLOP for each byte that must be moved", ylabel="TFLOP/s")
    axis.set_title(
        f"Roofline, our back ends, {device}: {limits.flops / 1e12:.4g} TFLOP/s, {limits.bytes / 1e12:.4g} TB/s"
    )
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
