"""What the outputs of compute-sanitizer, Nsight Compute and pip are taken to mean."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks.gpu_suite import correctness, profile, sanitize, wheels
from benchmarks.workload import Unavailable

PASSED = json.dumps({"row": "swiglu/tokens/triton/bf16", "status": "passed", "seconds": 1.0})
REFUSED = json.dumps({"row": "swiglu/tokens/triton/bf16", "status": "unavailable", "error": "no such back end"})
WRONG = json.dumps({"row": "swiglu/tokens/triton/bf16", "status": "failed", "error": "AssertionError: h: error"})
CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors"
INVALID = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at _swiglu_kernel+0x1f0
=========     by thread (0,0,0) in block (3,0,0)
========= ERROR SUMMARY: 1 error"""
HAZARD = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at _kernel+0x100 and Read access at _kernel+0x180 [8 hazards]
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"""
NO_HAZARD = "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"


@pytest.mark.parametrize("summary", [CLEAN, NO_HAZARD])
def test_sanitizer_without_findings_passes(summary: str) -> None:
    row = sanitize.judge(f"{PASSED}\n{REFUSED}\n{summary}\n", "", 0)
    assert row["cases"] == 1
    assert "SUMMARY: 0" in row["summary"]


@pytest.mark.parametrize(
    ("output", "code", "message"), [(INVALID, 86, "Invalid __global__ write"), (HAZARD, 86, "Race reported")]
)
def test_findings_fail(output: str, code: int, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        sanitize.judge(f"{PASSED}\n{output}", "", code)


def test_wrong_results_and_bad_exits_fail() -> None:
    with pytest.raises(AssertionError, match="swiglu/tokens/triton/bf16: AssertionError: h: error"):
        sanitize.judge(f"{WRONG}\n{CLEAN}", "", 1)
    with pytest.raises(AssertionError, match="exit code 139"):
        sanitize.judge(f"{PASSED}\n{CLEAN}", "", 139)


@pytest.mark.parametrize(
    ("stdout", "reason"),
    [
        ("========= Error: Device not supported.", "Device not supported"),
        (PASSED, "no summary from the sanitizer"),
        (f"{REFUSED}\n{CLEAN}", "no such back end"),
        (CLEAN, "printed no result"),
    ],
)
def test_a_sanitizer_that_saw_nothing_has_not_passed(stdout: str, reason: str) -> None:
    with pytest.raises(Unavailable, match=reason):
        sanitize.judge(stdout, "", 0)


def test_the_program_under_the_sanitizer_runs_the_small_cases() -> None:
    rows = correctness.small_rows("swiglu", "cpu")
    command = [sys.executable, "-m", "benchmarks.gpu_suite.child", "correctness", "cpu", *rows]
    done = subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["row"] for result in results] == rows
    assert {result["status"] for result in results} == {"passed"}
    assert sanitize.judge(f"{done.stdout}{CLEAN}", done.stderr, done.returncode)["cases"] == len(rows)


NCU = """==PROF== Connected to process 4242 (/usr/bin/python3.12)
==PROF== Profiling "_swiglu_fwd_kernel" - 0: 0%....50%....100% - 9 passes
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value","Rule Name"
"0","4242","_swiglu_fwd_kernel","GPU Speed Of Light Throughput","Duration","ns","12,345.50",""
"0","4242","_swiglu_fwd_kernel","GPU Speed Of Light Throughput","DRAM Throughput","%","87.5",""
"0","4242","_swiglu_fwd_kernel","SpeedOfLight","","","","Bottleneck"
"1","4242","_swiglu_bwd_kernel","Launch Statistics","Registers Per Thread","register/thread","40",""
"1","4242","_swiglu_bwd_kernel","Launch Statistics","Function Cache Configuration","","CachePreferNone",""
==PROF== Disconnected from process 4242
"""


def test_figures_of_each_kernel_are_read() -> None:
    assert profile.parse(NCU) == [
        {"kernel": "_swiglu_fwd_kernel", "figures": {"Duration [ns]": 12345.5, "DRAM Throughput [%]": 87.5}},
        {
            "kernel": "_swiglu_bwd_kernel",
            "figures": {
                "Registers Per Thread [register/thread]": 40.0,
                "Function Cache Configuration": "CachePreferNone",
            },
        },
    ]
    assert profile.parse("==ERROR== ERR_NVGPUCTRPERM\n") == []


def test_peers_are_pinned() -> None:
    assert all(line.count("==") == 1 for line in wheels.requirements())
    assert "liger-kernel" in wheels.names()


def make_wheel(folder: Path, name: str) -> Path:
    """A wheel of one module."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", "ANSWER = 42\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return path


def test_carried_wheels_are_installed_and_missing_ones_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    carried = tmp_path / "carried"
    carried.mkdir()
    wheel = make_wheel(carried, "carried_peer")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(wheels, "requirements", lambda: ["absent-peer==1.0"])
    found = wheels.install(carried, tmp_path / "site")
    assert found[wheel.name] is None
    assert "absent-peer==1.0" in str(found["absent-peer==1.0"])
    assert (tmp_path / "site" / "carried_peer.py").exists()
    assert sys.path[-1] == str(tmp_path / "site")
