"""Runs test files of a release of Megatron-LM on CPU processes, with and without our router and experts, and counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY = "https://github.com/NVIDIA/Megatron-LM"
FILES = (
    "a2a_token_dispatcher",
    "aux_loss",
    "grouped_mlp",
    "moe_layer",
    "moe_layer_discrepancy",
    "routers",
    "sequential_mlp",
    "shared_experts",
    "token_dispatcher",
    "upcycling",
)
NOISE = ("test_routers.py::TestTop2Router::test_force_load_balancing",)
"""Tests that ask for a gradient other than 0 where it is 0 but for rounding (of the sum of weights that add up to 1);
with `TokenRouter` it is 0."""
REFUSED = ("test_sequential_mlp.py::TestParallelSequentialMLP::test_constructor",)
"""Tests that ask for Sinkhorn routing, which `TokenRouter` refuses."""
_ORDER = ("failed", "skipped", "passed")
"""What a test did: the first of these that any process saw."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a test, over all processes."""

    result: str
    message: str


_LOST = Outcome("failed", "did not run")


def checkout(version: str) -> Path:
    """The sources of a release; cloned once (MEGATRON_LM_REPOSITORY: from there)."""
    folder = ROOT / "build" / "integrations" / f"Megatron-LM-{version}"
    if not folder.is_dir():
        source = os.environ.get("MEGATRON_LM_REPOSITORY", REPOSITORY)
        command = ["git", "clone", "-q", "--depth", "1", "--branch", f"core_v{version}", source, str(folder)]
        subprocess.run(command, check=True)
    return folder


def run_peer_files(
    version: str, files: Sequence[str], report: Path, *, swapped: bool, processes: int = 2
) -> dict[str, Outcome]:
    """Test -> what became of it, of some files; with `swapped` every MoELayer has our router and experts.

    Configurations are those that our experts take (SwiGLU without biases) either way.
    """
    sources = checkout(version)
    for rank in range(processes):
        Path(f"{report}.{rank}").unlink(missing_ok=True)
    paths = [sources, Path(__file__).parent, ROOT, ROOT / "kernels"]
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "SWAP": "experts" if swapped else "",
        "SWIGLU": "1",
        "REPORT": str(report),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port"]
    command += [str(29500 + os.getpid() % 400), "-m", "pytest", "-p", "megatron_moe_plugin"]
    # (Without the project's own options, which stop at the first failure.)
    command += [*["-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=", "-q", "--no-header", "--tb=line"]]
    command += ["--continue-on-collection-errors"]
    command += [f"tests/unit_tests/transformer/moe/test_{file}.py" for file in files]
    with open(Path(f"{report}.log"), "w", encoding="utf-8") as log:
        subprocess.run(command, cwd=sources, env=variables, stdout=log, stderr=log, timeout=3600, check=False)
    return _outcomes(report, processes)


def _outcomes(report: Path, processes: int) -> dict[str, Outcome]:
    found: dict[str, Outcome] = {}
    for rank in range(processes):
        for line in Path(f"{report}.{rank}").read_text(encoding="utf-8").splitlines():
            name, _, result, message = json.loads(line)
            old = found.get(name)
            if old is None or _ORDER.index(result) < _ORDER.index(old.result):
                found[name] = Outcome(result, message)
    return found


def count(outcomes: dict[str, Outcome]) -> dict[str, int]:
    """Tests that passed, failed and were skipped."""
    counts = Counter(each.result for each in outcomes.values())
    return {name: counts[name] for name in ("passed", "failed", "skipped")}


def compare(version: str, files: Sequence[str], folder: Path) -> dict[str, Any]:
    """Counts without and with our parts, and the tests that pass without them alone.

    `refused` are those of `REFUSED` that end in a ConfigError of ours, `noise` those of `NOISE`; `lost` are the others.
    `files` are those of which tests were found in both runs.
    """
    theirs = run_peer_files(version, files, folder / f"{version}-theirs", swapped=False)
    ours = run_peer_files(version, files, folder / f"{version}-ours", swapped=True)
    passed = [name for name, each in theirs.items() if each.result == "passed"]
    gone = [name for name in passed if ours.get(name, _LOST).result != "passed"]
    refusals = [name for name in gone if "parrot_sys.errors.ConfigError" in ours.get(name, _LOST).message]
    refused = [name for name in refusals if name.endswith(REFUSED)]
    found = {file for file in files if all(any(f"/test_{file}.py::" in name for name in run) for run in (theirs, ours))}
    noise = [name for name in gone if name.endswith(NOISE)]
    return {
        "theirs": count(theirs),
        "ours": count(ours),
        "files": found,
        "refused": refused,
        "noise": noise,
        "lost": [name for name in gone if name not in refused and name not in noise],
    }
