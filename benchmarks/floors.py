"""The least work of every benchmark shape and the time that it takes at best: a table and a figure. Needs no GPU.

python -m benchmarks.floors                                        # table
python -m benchmarks.floors --plot docs/figures/kernel_floors.svg  # figure of docs/kernels.md
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.gpu_suite.bench import workloads
from benchmarks.measure import H200_BYTES, H200_FLOPS
from benchmarks.workload import Workload

_MARKS = "osD^v<>PX*hp"


def measured_ops() -> list[Workload]:
    """Workloads of the GPU suite without those that measure the machine."""
    return [workload for workload in workloads("cuda").values() if workload.op != "ceiling"]


def table(found: Sequence[Workload]) -> str:
    """Work and floor of each pass."""
    lines = [f"{'workload':58} {'pass':8} {'GFLOP':>10} {'MB':>10} {'floor us':>10}  limit"]
    for workload in found:
        for which, cost in workload.costs.items():
            seconds = cost.floor_seconds(H200_FLOPS, H200_BYTES)
            limit = "products" if cost.flops / H200_FLOPS > cost.bytes / H200_BYTES else "memory"
            figures = f"{cost.flops / 1e9:10.4g} {cost.bytes / 1e6:10.4g} {seconds * 1e6:10.4g}"
            lines.append(f"{workload.id:58} {which:8} {figures}  {limit}")
    return "\n".join(lines)


def plot(found: Sequence[Workload], path: Path) -> None:
    """Shortest time of each shape (forward; both passes where an op has them in one) by operations for each byte."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    for mark, op in zip(_MARKS, sorted({workload.op for workload in found}), strict=False):
        costs = [next(iter(workload.costs.values())) for workload in found if workload.op == op]
        floors = [cost.floor_seconds(H200_FLOPS, H200_BYTES) * 1e6 for cost in costs]
        # A permutation multiplies nothing; a logarithmic axis has no place for zero.
        intensity = [max(cost.flops / cost.bytes, 0.1) for cost in costs]
        axis.plot(intensity, floors, mark, label=op, alpha=0.8, markersize=6)
    axis.axvline(H200_FLOPS / H200_BYTES, color="0.5", linewidth=1, linestyle="--")
    for text, side in (("memory is the limit  ", "right"), ("  products are", "left")):
        axis.text(
            H200_FLOPS / H200_BYTES, 0.97, text, ha=side, va="top", fontsize=8, transform=axis.get_xaxis_transform()
        )
    axis.set(xscale="log", yscale="log", xlabel="FLOP for each byte that must be moved", ylabel="floor, microseconds")
    ceilings = f"{H200_FLOPS / 1e12:.0f} TFLOP/s, {H200_BYTES / 1e12:.1f} TB/s"
    axis.set_title(f"Floors of the benchmark shapes ({ceilings}); nothing here is measured", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "floors", "svg.fonttype": "none"}):
        figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    parser.add_argument("--plot", type=Path, help="also draw them into this .svg or .png")
    arguments = parser.parse_args()
    found = [workload for workload in measured_ops() if arguments.only in workload.id]
    if not found:
        parser.error(f"no workload has {arguments.only!r} in its name")
    print(table(found))
    if arguments.plot is not None:
        plot(found, arguments.plot)
        print(f"figure: {arguments.plot}")


if __name__ == "__main__":
    main()
