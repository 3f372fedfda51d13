"""Stage `profile`: Nsight Compute's figures of the main kernels, each launch of one pass."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from typing import Any

from benchmarks.gpu_suite import bench
from benchmarks.gpu_suite.machine import tool
from benchmarks.harness import ROOT
from benchmarks.workload import Unavailable

WORKERS = 1
ROW_SECONDS = 150
# Sections, not metrics: their names are the same for every chip.
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis", "LaunchStats", "Occupancy")
MAIN = (
    "expert_mlp/parrot_7b_b4_dense",
    "expert_mlp/parrot_7b_b4_top2",
    "fp8_experts/parrot_7b_b4_dense",
    "token_experts/qwen3_30b_a3b",
    "grouped_gemm/parrot_7b_b16_top2_up",
    "grouped_gemm/d4096_n2048_e64_k4_up",
    "grouped_gemm/d4096_n2048_e64_k4_wgrad",
    "text_guided_routing/parrot_7b_b64_q1024",
    "topk_routing/qwen3_30b_a3b",
    "router_attention/wings_7b",
    "segment_attention/wings_7b",
    "linear_cross_entropy/parrot_7b",
    "swiglu/parrot_7b_b4_dense",
    "permute/qwen3_30b_a3b_permute",
    "permute/qwen3_30b_a3b_unpermute",
)


def rows(device: str) -> list[str]:
    """`op/name/contender/pass`, our contenders only; on a CPU the first workload of each op."""
    workloads = bench.workloads(device)
    main = MAIN if device == "cuda" else {workload.op: name for name, workload in workloads.items()}.values()
    return [
        f"{name}/{contender}/{which}"
        for name in main
        for contender in workloads[name].our_contenders(device)
        for which in workloads[name].costs
    ]


def run_row(row: str, device: str) -> dict[str, Any]:
    """Figures of every kernel that one pass launches.

    Raises:
        Unavailable: Nsight Compute is missing, may not read the counters, or saw no kernel.
    """
    program = tool("ncu")
    if program is None:
        raise Unavailable("ncu (Nsight Compute) is not on the PATH, nor in /usr/local/cuda/bin")
    command = [program, "--csv", "--print-units", "base", "--clock-control", "none", "--profile-from-start", "off"]
    for section in SECTIONS:
        command += ["--section", section]
    command += [sys.executable, "-m", "benchmarks.gpu_suite.child", "profile", device, row]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    kernels = parse(done.stdout)
    if done.returncode or not kernels:
        output = (done.stdout + done.stderr)[-1500:].strip()
        raise Unavailable(f"no figures from ncu (exit code {done.returncode}): {output}")
    return {"kernels": kernels}


def parse(output: str) -> list[dict[str, Any]]:
    """Kernels in launch order from ncu's CSV: `{"kernel": name, "figures": {"Duration [nsecond]": value, ...}}`."""
    lines = output.splitlines()
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if header is None:
        return []
    kernels: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(line for line in lines[header:] if line.startswith('"')))):
        if not row["Metric Name"]:
            continue  # a remark of a rule
        kernel = kernels.setdefault(row["ID"], {"kernel": row["Kernel Name"], "figures": {}})
        unit = f" [{row['Metric Unit']}]" if row["Metric Unit"] else ""
        kernel["figures"][row["Metric Name"] + unit] = _number(row["Metric Value"])
    return list(kernels.values())


def _number(text: str) -> float | str:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text
