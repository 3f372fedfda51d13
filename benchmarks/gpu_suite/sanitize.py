"""Stage `sanitize`: compute-sanitizer's memcheck and racecheck over the small correctness cases, op by op."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

from benchmarks.gpu_suite import correctness
from benchmarks.gpu_suite.machine import tool
from benchmarks.harness import ROOT
from benchmarks.workload import Unavailable

TOOLS = ("memcheck", "racecheck")
ROW_SECONDS = 400  # all small cases of an op; a kernel under the sanitizer runs many times as long
WORKERS = 4  # most of the time is the start of Python under the sanitizer
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
_FOUND = 86  # exit code when the sanitizer found something


def rows(device: str) -> list[str]:
    """`tool/op/backend`."""
    ops, backends = correctness.op_names(), correctness.backends(device)
    return [f"{name}/{op}/{backend}" for name in TOOLS for op in ops for backend in backends]


def run_row(row: str, device: str) -> dict[str, Any]:
    """Runs the small cases of one op under one tool.

    Raises:
        AssertionError: it found something, or results are wrong.
        Unavailable: the tool, or the back end, does not run here.
    """
    name, op, backend = row.split("/")
    program = tool("compute-sanitizer")
    if program is None:
        raise Unavailable("compute-sanitizer is not on the PATH, nor in /usr/local/cuda/bin")
    # PyTorch and Triton probe what the driver can do, and handle the errors that it answers: those are no findings.
    command = [program, "--tool", name, "--error-exitcode", str(_FOUND), "--report-api-errors", "no"]
    command += [sys.executable, "-m", "benchmarks.gpu_suite.child", "correctness", device]
    # Each tensor gets memory of its own: within the allocator's large blocks no access would be out of bounds.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [*command, *correctness.small_rows(op, backend)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    return judge(done.stdout, done.stderr, done.returncode)


def judge(stdout: str, stderr: str, code: int) -> dict[str, Any]:
    """What the output of the sanitizer and of the program under it says.

    Raises:
        AssertionError: an error, a hazard or a wrong result.
        Unavailable: the sanitizer did not get to its summary, or no case ran.
    """
    results = [json.loads(line) for line in stdout.splitlines() if line.startswith('{"row"')]
    output = "\n".join([*(line for line in stdout.splitlines() if not line.startswith("{")), stderr])
    failed = [result for result in results if result["status"] == "failed"]
    assert not failed, f"{failed[0]['row']}: {failed[0]['error']}"
    summary = _SUMMARY.search(output)
    if summary is None:
        raise Unavailable(f"no summary from the sanitizer (exit code {code}): {output[-1500:].strip()}")
    assert summary[1] == "0", f"{summary[0]}: {_findings(output)}"
    passed = [result["row"] for result in results if result["status"] == "passed"]
    if not passed:
        reasons = {result["error"] for result in results}
        raise Unavailable("; ".join(sorted(reasons)) or f"the program printed no result: {output[-1500:].strip()}")
    assert code == 0, f"exit code {code}: {output[-1500:].strip()}"
    return {"cases": len(passed), "summary": summary[0]}


def _findings(output: str) -> str:
    """The sanitizer's own lines, which begin with a row of equals signs."""
    return "\n".join([line for line in output.splitlines() if line.startswith("=====")][:40])
