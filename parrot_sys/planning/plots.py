"""Figures of plans, without pyplot, so that nothing global is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from parrot_sys.planning.cluster import ClusterConfig
from parrot_sys.planning.estimate import Estimate

_COMMUNICATION = ("tensor parallel", "context parallel", "expert parallel", "pipeline messages", "data parallel")
# Parts of a step that are drawn together, in the order of the bars.
_TIME = {
    "decoder": ("decoder GEMMs", "attention", "norms, SwiGLU", "launches"),
    "vision, projector": ("vision", "projector"),
    "experts": ("experts",),
    "LM head": ("LM head",),
    "recomputation": ("recomputation",),
    "communication": _COMMUNICATION,
    "pipeline bubble": ("pipeline bubble",),
    "optimizer": ("optimizer",),
}
_COLORS = ("#2b6cb0", "#63b3ed", "#38a169", "#b7791f", "#a0aec0", "#dd6b20", "#e53e3e", "#805ad5")


def grouped_seconds(each: Estimate) -> dict[str, float]:
    """Parts of a step as the figures show them."""
    return {name: sum(each.seconds.get(part, 0.0) for part in parts) for name, parts in _TIME.items()}


def layouts(estimates: Sequence[Estimate], cluster: ClusterConfig, path: Path) -> None:
    """Memory of each layout in GB and time of a step in seconds, in stacked bars."""
    names = [_name(each) for each in estimates]
    figure = Figure(figsize=(10, 1.6 + 0.38 * len(estimates)), layout="constrained")
    memory, time = figure.subplots(1, 2, sharey=True)
    _stack(memory, names, [{k: v / 1e9 for k, v in each.memory.as_dict().items()} for each in estimates])
    memory.axvline(cluster.usable_bytes / 1e9, color="black", linewidth=1, linestyle="--", label="usable")
    memory.set_xlabel("GB a GPU")
    _stack(time, names, [grouped_seconds(each) for each in estimates])
    time.set_xlabel("seconds a step")
    memory.invert_yaxis()
    for ax in (memory, time):
        ax.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)
    figure.supxlabel(f"predicted, {cluster.num_gpus} x {cluster.gpu}", fontsize=8)
    save(figure, path)


def scaling(best: Sequence[tuple[int, Estimate]], cluster: ClusterConfig, path: Path) -> None:
    """Samples a second over GPUs beside ideal scaling, and shares of the step."""
    numbers = [number for number, _ in best]
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    rate, shares = figure.subplots(1, 2)
    one = best[0][1].samples_per_second / best[0][0]
    rate.plot(numbers, [each.samples_per_second for _, each in best], marker="o", color=_COLORS[0], label="predicted")
    rate.plot(numbers, [one * number for number in numbers], color="black", linestyle="--", linewidth=1, label="ideal")
    rate.set_xscale("log", base=2)
    rate.set_yscale("log", base=10)
    rate.set_xticks(numbers, [str(number) for number in numbers], fontsize=7)
    rate.set_xlabel(f"GPUs ({cluster.gpu})")
    rate.set_ylabel("samples a second")
    rate.grid(alpha=0.3)
    rate.legend(fontsize=8)
    names = [f"{number}: {_name(each)}" for number, each in best]
    parts = [{key: 100 * value / each.step_seconds for key, value in grouped_seconds(each).items()} for _, each in best]
    _stack(shares, names, parts)
    shares.invert_yaxis()
    shares.set_xlim(0, 100)
    shares.set_xlabel("% of the step")
    shares.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)
    figure.supxlabel("predicted by formulas, not measured", fontsize=8)
    save(figure, path)


def _name(each: Estimate) -> str:
    layout = each.layout
    size = f"{each.micro_batch_rows} x {each.num_micro_batches} rows"
    marks = [size, *(["ZeRO-1"] if layout.distributed_optimizer else []), *(["recompute"] if layout.recompute else [])]
    return ", ".join([layout.describe(), *marks])


def _stack(ax: Axes, names: Sequence[str], rows: Sequence[Mapping[str, float]]) -> None:
    """Horizontal stacked bars; parts that are nowhere seen get no colour and no legend."""
    left = [0.0] * len(rows)
    for key, color in zip(rows[0], _COLORS, strict=False):
        values = [row[key] for row in rows]
        if any(values):
            ax.barh(range(len(rows)), values, left=left, label=key, color=color, height=0.7)
        left = [start + value for start, value in zip(left, values, strict=True)]
    ax.set_yticks(range(len(rows)), names, fontsize=7)


def save(figure: Figure, path: Path) -> None:
    """Writes the figure; the same figure gives the same SVG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "parrot plan", "svg.fonttype": "none"}):
        figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
