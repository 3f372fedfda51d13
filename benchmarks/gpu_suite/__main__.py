"""Command line of the suite; see the package's docstring.

Exit code 0: what could run passed; 1: something failed; 3: nothing failed, but the budget ended before the last row
(the same command goes on from there).
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Runs from a checkout as it is, installed or not, and so do the programs that the sanitizer and the profiler start.
FOLDERS = [str(ROOT), str(ROOT / "kernels")]
sys.path[:0] = [folder for folder in FOLDERS if folder not in sys.path]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*FOLDERS, os.environ.get("PYTHONPATH")]))
# cuBLAS is deterministic with it, which the correctness stage asks of every result.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from benchmarks.gpu_suite import (  # noqa: E402
    accelerators,
    bench,
    correctness,
    end_to_end,
    machine,
    profile,
    render,
    sanitize,
    wheels,
)
from benchmarks.gpu_suite.crew import Row, run_rows  # noqa: E402
from benchmarks.gpu_suite.store import OtherRun, Store  # noqa: E402

STAGES: dict[str, ModuleType] = {
    "correctness": correctness,
    "sanitize": sanitize,
    "bench": bench,
    "profile": profile,
    "accelerators": accelerators,
    "end_to_end": end_to_end,
}
FAILED, INCOMPLETE = 1, 3
BENCH_SHARE = 1 / 3  # of the budget of `first`, kept for its bench rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    summaries = {name: (module.__doc__ or "").splitlines()[0] for name, module in STAGES.items()}
    calls = {name: (function.__doc__ or "").splitlines()[0] for name, function in CALLS.items()}
    for name, summary in {**calls, **summaries}.items():
        stage = commands.add_parser(name, help=summary)
        stage.add_argument("--json", type=Path, required=True, help="results file; an existing one is gone on with")
        stage.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny shapes, as a rehearsal")
        stage.add_argument("--budget", type=float, default=450, help="seconds of one run of a stage (default 450)")
        stage.add_argument("--row-limit", type=float, help="seconds after which a row failed (default: by stage)")
        stage.add_argument("--workers", type=int, help="processes at a time (default: by stage)")
        stage.add_argument(
            "--only", action="append", default=[], help="only rows whose name holds this; may be repeated"
        )
        stage.add_argument("--retry", action="store_true", help="also rows that failed or were unavailable before")
        stage.add_argument("--fresh", action="store_true", help="forget what the file holds, all stages of it")
        stage.add_argument("--wheels", type=Path, help="folder of wheels to install peers from (see wheels.txt)")
        stage.add_argument("--commit", help="names the sources where there is no git")
    drawing = commands.add_parser("render", help=(render.__doc__ or "").splitlines()[0])
    drawing.add_argument("file", type=Path)
    drawing.add_argument("--out", type=Path, help="folder of the table and the plots (default: that of the file)")
    return parser.parse_args(argv)


def describe_machine(device: str, commit: str | None) -> dict[str, Any]:
    """In a process of its own, since this one must not touch CUDA.

    Raises:
        SystemExit: there is no such device.
    """
    found: list[Row] = []

    def work(_: str) -> Row:
        return {"machine": machine.describe(device, commit)}

    run_rows([device], work, lambda _, row: found.append(row), workers=1, seconds=120, row_seconds=110)
    if not found or found[0]["status"] != "passed":
        sys.exit(f"no device {device!r}: {found[0]['error'] if found else 'it does not answer'}")
    return found[0]["machine"]


def run_stage(args: argparse.Namespace, rows: Sequence[str] | None = None) -> Counter[str]:
    """Runs one stage, or only these rows of it, within its budget; returns the number of its rows by status."""
    start, module = time.monotonic(), STAGES[args.command]
    installed = None
    if args.wheels:
        installed = wheels.install(args.wheels, Path(tempfile.gettempdir()) / f"gpu_suite_peers_{os.getuid()}")
    try:
        store = Store(args.json, describe_machine(args.device, args.commit), fresh=args.fresh)
    except (OtherRun, ValueError) as error:
        sys.exit(f"{error}; give another --json, or --fresh to replace it")
    if installed is not None:
        store.content["wheels"] = installed
    again = ("not_run", "failed", "unavailable") if args.retry else ("not_run",)
    known = store.rows(args.command)
    wanted = [name for name in module.rows(args.device) if not args.only or any(part in name for part in args.only)]
    wanted = [name for name in wanted if rows is None or name in rows]
    todo = [name for name in wanted if name not in known or known[name]["status"] in again]

    def record(name: str, row: Row) -> None:
        store.record(args.command, name, {**row, "device": store.content["machine"]["device"]})
        error = str(row.get("error", "")).splitlines()
        print(f"{row['status']:12} {name} {error[0][:150] if error else ''}", flush=True)

    work = functools.partial(module.run_row, device=args.device)
    left = max(0.0, args.budget - (time.monotonic() - start))
    workers = args.workers or module.WORKERS
    not_run = run_rows(
        todo, work, record, workers=workers, seconds=left, row_seconds=args.row_limit or module.ROW_SECONDS
    )
    seconds = round(time.monotonic() - start, 1)
    store.end_run(args.command, {"seconds": seconds, "budget": args.budget, "begun": len(todo) - len(not_run)}, not_run)
    counts = Counter(store.rows(args.command)[name]["status"] for name in wanted)
    print(f"{args.command}: {', '.join(f'{count} {status}' for status, count in counts.items())}; {seconds:.0f} s")
    return counts


def run_first(args: argparse.Namespace) -> Counter[str]:
    """The first call on a machine: correctness, then the bench rows that decide the README's table, in one budget."""
    end = time.monotonic() + args.budget
    args.command, args.budget = "correctness", args.budget * (1 - BENCH_SHARE)
    total = run_stage(args)
    args.fresh = False  # once
    args.command, args.budget = "bench", end - time.monotonic()
    return total + run_stage(args, bench.decisive_rows(args.device))


def run_all(args: argparse.Namespace) -> Counter[str]:
    """All stages, each until none of its rows is left, then the table and the plots."""
    total: Counter[str] = Counter()
    for command in STAGES:
        args.command, left = command, -1
        while True:
            counts = run_stage(args)
            args.fresh = args.retry = False  # once
            if counts["not_run"] in (0, left):  # done, or no progress
                break
            left = counts["not_run"]
        total += counts
    draw(args.json, args.json.parent)
    return total


def draw(file: Path, folder: Path) -> None:
    """Writes the table and the plots, and prints where."""
    for path in render.render(file, folder):
        print(path)


CALLS: dict[str, Callable[[argparse.Namespace], Counter[str]]] = {"first": run_first, "all": run_all}


def main(argv: list[str] | None = None) -> int:
    """Runs stages, or renders a results file; returns the exit code."""
    args = parse(argv)
    if args.command == "render":
        draw(args.file, args.out or args.file.parent)
        return 0
    counts = CALLS.get(args.command, run_stage)(args)
    return FAILED if counts["failed"] else INCOMPLETE if counts["not_run"] else 0


if __name__ == "__main__":
    sys.exit(main())
