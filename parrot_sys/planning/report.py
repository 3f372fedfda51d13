"""Output of `parrot plan`: a table of layouts, the best one in words, JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from parrot_sys import markdown_tables
from parrot_sys.config_values import config_to_dict
from parrot_sys.errors import ConfigError
from parrot_sys.planning.checks import check
from parrot_sys.planning.config import PlanConfig
from parrot_sys.planning.estimate import Estimate, estimate, peak_memory
from parrot_sys.systems.layout import Layout

PREDICTED = "Predicted by formulas from data-sheet figures and assumed efficiencies, not measured."
_COLUMNS = ("TP", "SP", "PP", "VPP", "CP", "EP", "ETP", "DP", "ZeRO-1", "recompute", "rows x micro-batches")
_FIGURES = ("GB/GPU", "s/step", "samples/s", "tokens/s/GPU", "MFU %")


def table(estimates: Sequence[Estimate], best: Estimate) -> str:
    """One line a layout, a star before the best."""
    rows = [["*" if each is best else "", *_sizes(each), *_figures(each)] for each in estimates]
    lines = [["", *_COLUMNS, *_FIGURES], *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _sizes(each: Estimate) -> list[str]:
    layout = each.layout
    sizes = [layout.tensor, layout.pipeline, layout.virtual, layout.context, layout.expert, layout.expert_tensor]
    text = [str(size) for size in (*sizes, layout.data)]
    text.insert(1, "yes" if layout.sequence else "no")
    text += ["yes" if layout.distributed_optimizer else "no", "full" if layout.recompute else "none"]
    return [*text, f"{each.micro_batch_rows} x {each.num_micro_batches}"]


def _figures(each: Estimate) -> list[str]:
    rate = each.rows / each.step_seconds / each.layout.num_gpus
    figures = [f"{each.memory.total / 1e9:.1f}", f"{each.step_seconds:.3g}", f"{each.samples_per_second:.4g}"]
    return [*figures, f"{rate:.0f}", f"{100 * each.mfu:.0f}"]


def explain(config: PlanConfig, best: Estimate) -> str:
    """Why this layout, where its memory and time go, what the simpler ones lack, and how to run it."""
    cluster, layout, memory = config.cluster, best.layout, best.memory
    usable = cluster.usable_bytes / 1e9
    lines = [
        f"* Best on {cluster.num_gpus} x {cluster.gpu} ({cluster.nodes} x {cluster.gpus_per_node}): "
        f"{layout.describe()}, {'with' if layout.distributed_optimizer else 'without'} ZeRO-1, recompute "
        f"{'full' if layout.recompute else 'none'}, {best.num_micro_batches} micro-batches of at most "
        f"{best.micro_batch_rows} rows on each data-parallel rank.",
        f"Memory: {memory.total / 1e9:.1f} of {usable:.1f} usable GB ({_largest(memory.as_dict(), 1e9, 'GB')}).",
        f"Time: {best.step_seconds:.3g} s a step ({_largest(best.seconds, 1.0, 's')}), {100 * best.mfu:.0f}% of the "
        "bf16 peak.",
    ]
    lines += [f"- {line}" for line in _alternatives(config, best)]
    lines += ["Run it with:", *(f"  {flag}" for flag in layout.flags(best.micro_batch_rows)), PREDICTED]
    return "\n".join(lines)


def _largest(parts: dict[str, float], unit: float, name: str) -> str:
    """The parts that matter, largest first."""
    shown = sorted(parts.items(), key=lambda item: -item[1])
    total = sum(parts.values())
    return ", ".join(f"{key} {value / unit:.3g} {name}" for key, value in shown if value > 0.02 * total)


def _alternatives(config: PlanConfig, best: Estimate) -> list[str]:
    """Needs of the layout with one of its measures left out or added."""
    layout, job, lines = best.layout, config.job(), []
    for text, other in _variations(layout):
        try:
            check(config.model, other, config.cluster.num_gpus, config.global_batch_size)
        except ConfigError:
            continue
        memory = peak_memory(config, job, other)
        needs = f"{text} it would need {memory.total / 1e9:.1f} GB a GPU"
        if memory.total > config.cluster.usable_bytes:
            lines.append(f"{needs}, which does not fit.")
        else:
            slower = estimate(config, job, other, memory).step_seconds / best.step_seconds - 1
            lines.append(f"{needs} and take {abs(slower):.0%} {'more' if slower >= 0 else 'less'} time.")
    return lines


def _variations(layout: Layout) -> list[tuple[str, Layout]]:
    """Simpler layouts on the same GPUs, with the words that introduce them."""
    found = []
    for name, field in (("tensor", "tensor"), ("pipeline", "pipeline"), ("context", "context")):
        if (size := getattr(layout, field)) > 1:
            less: dict[str, Any] = {field: 1, "data": layout.data * size}
            if field == "tensor":
                less |= {"sequence": False, "expert_tensor": 1}
            if field == "pipeline":
                less["virtual"] = 1
            found.append((f"Without {name} parallelism", replace(layout, **less)))
    if layout.expert > 1:
        found.append(("Without expert parallelism", replace(layout, expert=1)))
    if layout.virtual > 1:
        found.append(("With the plain pipeline schedule", replace(layout, virtual=1)))
    if layout.model_copies > 1:
        word = "Without" if layout.distributed_optimizer else "With"
        found.append((f"{word} ZeRO-1", replace(layout, distributed_optimizer=not layout.distributed_optimizer)))
    word = "Without" if layout.recompute else "With"
    found.append((f"{word} recomputation", replace(layout, recompute=not layout.recompute)))
    found.append(("With twice the samples in a micro-batch", replace(layout, samples=2 * layout.samples)))
    return found


def as_dict(each: Estimate) -> dict[str, Any]:
    """One layout for JSON; bytes and seconds."""
    layout = config_to_dict(each.layout)
    return {
        "layout": layout,
        "memory_bytes": each.memory.as_dict() | {"total": each.memory.total},
        "num_micro_batches": each.num_micro_batches,
        "micro_batch_rows": each.micro_batch_rows,
        "seconds": dict(each.seconds) | {"total": each.step_seconds},
        "samples_per_second": each.samples_per_second,
        "mfu": each.mfu,
        "flags": each.layout.flags(each.micro_batch_rows),
    }


def report(config: PlanConfig, estimates: Sequence[Estimate], best: Estimate) -> dict[str, Any]:
    """All of it for JSON, with everything that was assumed."""
    return {
        "note": PREDICTED,
        "assumptions": {"gpu": _data_sheet(config), **config_to_dict(config)},
        "best": as_dict(best),
        "layouts": [as_dict(each) for each in estimates[: config.top]],
        "layouts_that_fit": len(estimates),
    }


def scaling_report(config: PlanConfig, best: Sequence[tuple[int, Estimate]]) -> dict[str, Any]:
    """The best layout of each number of GPUs for JSON."""
    return {
        "note": PREDICTED,
        "assumptions": {"gpu": _data_sheet(config), **config_to_dict(config)},
        "gpus": {number: as_dict(each) for number, each in best},
    }


def _data_sheet(config: PlanConfig) -> dict[str, Any]:
    figures = config.cluster.type
    return {name: getattr(figures, name) for name in figures.__slots__}


def scaling_table(best: Sequence[tuple[int, Estimate]]) -> str:
    """A Markdown table: the best layout of each number of GPUs, and how well the numbers scale."""
    header = ["GPUs", "layout", "ZeRO-1", "recompute", "samples a step", "GB a GPU", "s a step", "samples/s", "MFU"]
    rows = []
    first_number, first = best[0]
    for number, each in best:
        efficiency = each.samples_per_second / number / (first.samples_per_second / first_number)
        rows.append(
            [
                str(number),
                each.layout.describe(),
                "yes" if each.layout.distributed_optimizer else "no",
                "full" if each.layout.recompute else "none",
                str(each.samples),
                f"{each.memory.total / 1e9:.1f}",
                _significant(each.step_seconds),
                _significant(each.samples_per_second),
                f"{each.mfu:.0%}",
                f"{efficiency:.0%}",
            ]
        )
    return "\n".join(markdown_tables.table([*header, "efficiency"], rows, numbers=False))


def _significant(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}"
