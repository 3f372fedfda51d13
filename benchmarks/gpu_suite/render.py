"""Draws a results file: a Markdown table of every stage, speed against size, and a roofline."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_suite.analysis import Ceilings, Timing, best_peer, ceilings, rows, timings, verdicts
from benchmarks.gpu_suite.store import STATUSES, load

MARKS = {True: "met", False: "MISSED", None: "not measured"}
# Of Nsight Compute's figures, those that say what a kernel waits for.
FIGURES = (
    "Duration",
    "Compute (SM) Throughput",
    "DRAM Throughput",
    "L2 Hit Rate",
    "Registers Per Thread",
    "Achieved Occupancy",
)


def render(path: Path, folder: Path) -> list[Path]:
    """Writes `NAME.md` and, where the bench stage ran, `NAME_speed.png` and `NAME_roofline.png`; returns the paths.

    Raises:
        ValueError: `path` is no results file.
    """
    from benchmarks.gpu_suite import plots  # matplotlib, which only drawing needs

    content = load(path)
    measured, limits = timings(content), ceilings(content)
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    if limits is not None and any(timing.op != "ceiling" for timing in measured):
        found += [folder / f"{path.stem}_speed.png", folder / f"{path.stem}_roofline.png"]
        plots.speed(measured, limits, str(content["machine"]["device"]), found[0])
        plots.roofline(measured, limits, str(content["machine"]["device"]), found[1])
    table = folder / f"{path.stem}.md"
    table.write_text(markdown(content, measured, limits, [plot.name for plot in found]))
    return [table, *found]


def markdown(content: Mapping[str, Any], measured: list[Timing], limits: Ceilings | None, plots: Sequence[str]) -> str:
    """The whole report."""
    parts = [_heading(content), _summary(content), _problems(content), _correctness(rows(content, "correctness"))]
    parts += [_sanitizer(rows(content, "sanitize")), _speed(measured, limits, str(content["machine"]["device"]))]
    parts += [f"![]({name})" for name in plots]
    parts.append(_profile(rows(content, "profile")))
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(columns: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(columns), "|" + "---|" * len(columns), *map(line, lines)])


def _heading(content: Mapping[str, Any]) -> str:
    machine = content["machine"]
    names = ("device", "driver", "cuda", "torch", "triton", "python", "commit", "sources", "time")
    lines = [(name, machine.get(name)) for name in names]
    packages = ", ".join(f"{name} {version or 'absent'}" for name, version in machine.get("packages", {}).items())
    return f"# Results on {machine['device']}\n\n" + _table(("", ""), [*lines, ("packages", packages)])


def _summary(content: Mapping[str, Any]) -> str:
    lines = []
    for stage, found in content["stages"].items():
        counts = Counter(row["status"] for row in found["rows"].values())
        seconds = sum(run["seconds"] for run in found["runs"])
        lines.append((stage, *(counts[status] for status in STATUSES), f"{seconds:.0f}"))
    return "## Stages\n\n" + _table(("stage", *STATUSES, "seconds"), lines)


def _problems(content: Mapping[str, Any]) -> str:
    """What failed, was not available or was not run, with the reasons; rows of one reason on one line."""
    found: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for stage, results in content["stages"].items():
        for name, row in results["rows"].items():
            if row["status"] != "passed":
                found[row["status"], stage, row["error"]].append(name)
    order = sorted(found.items(), key=lambda item: STATUSES.index(item[0][0]))
    lines = [(status, stage, len(names), names[0], error[:300]) for (status, stage, error), names in order]
    return "## Not passed\n\n" + _table(("status", "stage", "rows", "first of them", "why"), lines) if lines else ""


def _correctness(found: Mapping[str, Mapping[str, Any]]) -> str:
    if not found:
        return ""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for name, row in found.items():
        op, _, backend, dtype = name.split("/")
        groups[op, backend, dtype].append(row)
    lines = []
    for key, members in sorted(groups.items()):
        counts = Counter(row["status"] for row in members)
        errors = [error for row in members for error in row.get("errors", {}).values()]
        lines.append((*key, *(counts[status] for status in STATUSES), f"{max(errors):.1e}" if errors else ""))
    columns = ("op", "back end", "dtype", *STATUSES, "largest error / largest value")
    return "## Correctness against float64\n\n" + _table(columns, lines)


def _sanitizer(found: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [(*name.split("/"), row["status"], row.get("summary", "")) for name, row in sorted(found.items())]
    columns = ("tool", "op", "back end", "status", "summary")
    return "## compute-sanitizer\n\n" + _table(columns, lines) if lines else ""


def _speed(measured: list[Timing], limits: Ceilings | None, device: str) -> str:
    if not measured:
        return ""
    floor = "no ceilings were measured, so there are no floors"
    if limits is not None:
        floor = f"floors with {limits.flops / 1e12:.4g} TFLOP/s and {limits.bytes / 1e12:.4g} TB/s ({limits.source})"
    lines = []
    for timing in sorted(measured, key=lambda t: (t.workload, t.which, t.ms)):
        peer = best_peer(timing, measured) if timing.ours else None
        targets = verdicts(timing, measured) if limits is not None and limits.source == "H200" else {}
        lines.append(
            (
                timing.workload,
                timing.which,
                f"**{timing.contender}**" if timing.ours else timing.contender,
                f"{timing.ms:.4f}",
                f"{timing.p10_ms:.4f} - {timing.p90_ms:.4f}",
                f"{timing.tflops:.3g}",
                f"{timing.gbytes_s:.4g}",
                "" if limits is None else f"{timing.share:.1%}",
                "" if timing.saved_mb is None else f"{timing.saved_mb:.4g}",
                "" if peer is None else f"{peer.ms / timing.ms:.2f} x {peer.contender}",
                "; ".join(f"{text}: {MARKS[verdict]}" for text, verdict in targets.items()),
            )
        )
    columns = [
        "workload",
        "pass",
        "contender",
        f"ms on {device}",
        "p10 - p90",
        "TFLOP/s",
        "GB/s",
        "of floor",
        "saved MB",
    ]
    columns += ["best peer", "targets"]
    unchecked = "Bounds (`*_bound`, `*_unweighted`) leave out part of the work; every other result was equal to ours."
    return f"## Speed\n\nMedians; {floor}. Ours in bold. {unchecked}\n\n" + _table(columns, lines)


def _profile(found: Mapping[str, Mapping[str, Any]]) -> str:
    lines = []
    for name, row in found.items():
        for kernel in row.get("kernels", []):
            figures = {
                key.split(" [")[0]: f"{value:.4g}"
                for key, value in kernel["figures"].items()
                if isinstance(value, float)
            }
            lines.append((name, kernel["kernel"][:60], *(figures.get(figure, "") for figure in FIGURES)))
    return "## Nsight Compute\n\n" + _table(("pass", "kernel", *FIGURES), lines) if lines else ""
