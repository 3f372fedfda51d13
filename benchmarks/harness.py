"""Measuring side by side on a noisy machine, and the JSON that a claim of speed comes with."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent


def interleaved_times(
    runs: Mapping[str, Callable[[], object]], repeats: int, *, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each run, taken in turns so that a disturbance hits all alike; one round warms up and is dropped.

    Args:
        runs: what is timed, by name.
        repeats: rounds that count.
        clock: of the seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = clock()
            run()
            times[name].append(clock() - start)
    return {name: values[1:] for name, values in times.items()}


def ratio(times: Mapping[str, Sequence[float]], baseline: str, ours: str) -> float:
    """Speed-up of `ours`: the ratio of the medians."""
    return statistics.median(times[baseline]) / statistics.median(times[ours])


def saved_bytes(run: Callable[[], object], excluded: Sequence[Tensor]) -> int:
    """Bytes of the distinct storages that a forward pass keeps for its backward pass.

    Args:
        run: the forward pass.
        excluded: inputs and parameters, which exist anyway.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    saved: dict[int, int] = {}
    kept: list[Tensor] = []  # a freed storage's address could come again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    del output
    return sum(saved.values())


def machine() -> dict[str, Any]:
    """Device, versions and commit."""
    return {
        "device": _cpu_name(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],  # what else ran: above the number of threads, times are not to be trusted
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str:
    """HEAD, with `-dirty` when files differ from it; "unknown" without git or outside of a repository."""
    if shutil.which("git") is None:
        return "unknown"
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return described.stdout.strip() or "unknown"


def argument_parser(description: str | None, repeats: int) -> argparse.ArgumentParser:
    """`--json`, `--threads`, `--repeats`, as every benchmark that runs by itself takes them."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the results here as well")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"timed rounds (default {repeats})")
    return parser


def parse_arguments(description: str | None, repeats: int) -> argparse.Namespace:
    """Values of the arguments of `argument_parser`; sets the threads."""
    arguments = argument_parser(description, repeats).parse_args()
    torch.set_num_threads(arguments.threads)
    return arguments


def report(name: str, rows: Sequence[Mapping[str, Any]], path: Path | None) -> None:
    """Print a table of the rows, and write them with the machine's description to `path`."""
    columns = list(rows[0])
    table = [columns, *([_text(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"benchmark": name, "machine": machine(), "rows": list(rows)}, indent=1) + "\n")


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
