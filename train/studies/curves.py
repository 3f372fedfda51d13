"""Plots of an experiment whose variants lie on curves: means joined by lines, the seeds as dots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One variant: a value of each seed on both axes, or one for all on an axis that is set."""

    x: Sequence[float]
    y: Sequence[float]
    label: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One plot."""

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[Point]]
    """Name -> points in the order in which they are joined."""
    ticks: Mapping[float, str] = field(default_factory=dict)
    """Places on the x axis with names, where those without a point say so; numbers where there are none."""
    limits: tuple[float, float] | None = None
    """Ends of the y axis; as the points need when not given."""


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Panels side by side in one PNG file; a line has the same colour in all of them."""
    width = max(6.4, 4.4 * len(panels))
    figure = Figure(figsize=(width, 4.4), layout="constrained")
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    handles = {}
    for ax, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, points in panel.lines.items():
            color = f"C{names.index(name)}"
            means = [(fmean(point.x), fmean(point.y)) for point in points]
            handles[name] = ax.plot(*zip(*means, strict=True), color=color, marker="o", markersize=5, label=name)[0]
            for point, mean in zip(points, means, strict=True):
                x = point.x if len(point.x) == len(point.y) else [fmean(point.x)] * len(point.y)
                ax.plot(x, point.y, linestyle="none", marker="o", markersize=2.5, color=color, alpha=0.5)
                ax.annotate(point.label, mean, textcoords="offset points", xytext=(5, 4), fontsize=7, color=color)
        if panel.ticks:
            there = {fmean(point.x) for points in panel.lines.values() for point in points}
            names_there = [name if at in there else f"{name}\n(not run)" for at, name in panel.ticks.items()]
            ax.set_xticks(list(panel.ticks), names_there)
            ax.set_xlim(min(panel.ticks) - 0.3, max(panel.ticks) + 0.3)
        if panel.limits is not None:
            ax.set_ylim(panel.limits)
        ax.set_title(panel.title, fontsize=9)
        ax.set_xlabel(panel.x_label)
        ax.set_ylabel(f"{panel.y_label}; dots: seeds", fontsize=8)
        ax.grid(alpha=0.3)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=int(width / 2.1), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def cells(content: Mapping[str, Any], **chosen: Any) -> Iterable[tuple[Mapping[str, Any], list[Mapping[str, Any]]]]:
    """(place, records of its seeds) of every variant that was run and lies at the chosen values of axes."""
    for name, at in content["at"].items():
        records = list(content["results"].get(name, {}).values())
        if records and all(at.get(axis) == value for axis, value in chosen.items()):
            yield at, records
