"""What the sanitizer and the profiler run: correctness rows, or one pass of a workload, in this very process.

python -m benchmarks.gpu_suite.child correctness DEVICE ROW...     prints one JSON line for each row
python -m benchmarks.gpu_suite.child profile DEVICE OP/NAME/CONTENDER/PASS
"""

from __future__ import annotations

import functools
import json
import sys

import torch

from benchmarks.gpu_suite import bench, correctness
from benchmarks.gpu_suite.crew import attempt
from benchmarks.measure import InputSets, contender_of, pass_runs, running_as


def check(device: str, rows: list[str]) -> int:
    """Exit code 1 when one fails."""
    failed = False
    for name in rows:
        row = attempt(functools.partial(correctness.run_row, device=device, thorough=False), name)
        print(json.dumps({"row": name, **row}), flush=True)
        failed |= row["status"] == "failed"
    return int(failed)


def profile(device: str, row: str) -> int:
    """Two passes to warm up and tune, then one between the profiler's marks."""
    workload, name, which = bench.find(row, device)
    inputs = InputSets(workload, device).sets[0]
    with running_as(workload, name):
        run = pass_runs(workload, contender_of(workload, name), inputs)[which]
        for _ in range(2):
            run()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        run()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    what, device, *rest = sys.argv[1:]
    sys.exit(check(device, rest) if what == "correctness" else profile(device, rest[0]))
