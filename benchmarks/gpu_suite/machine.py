"""What results come from: device, driver, versions, commit and sources."""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.gpu_suite import wheels

SOURCES = (
    "csrc/**/*",
    "kernels/parrot_kernels/**/*.py",
    "parrot_sys/ops/*.py",
    "parrot_sys/modules/*.py",
    "benchmarks/**/*.py",
)
PACKAGES = ("numpy", "triton", "transformer-engine", "flash-attn")


def describe(device: str, commit: str | None) -> dict[str, Any]:
    """Touches the device: call it in a process of its own."""
    found = harness.machine()
    host = found.pop("device")
    found |= {"host": host, "commit": commit or found["commit"], "sources": sources_digest()}
    found |= {"cuda": torch.version.cuda, "driver": None, "device": host if device == "cpu" else None}
    found["packages"] = {name: _version(name) for name in (*PACKAGES, *wheels.names())}
    found["triton"] = found["packages"]["triton"]
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "driver": _nvidia_smi("driver_version"),
            "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "l2_mb": round(properties.L2_cache_size / 1e6, 1),
            "clocks": _nvidia_smi("clocks.sm,clocks.mem,clocks.max.sm,power.limit"),
        }
    return found


def sources_digest() -> str:
    """Of everything that a result depends on; the machine may have no git."""
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(harness.ROOT.glob(pattern)):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(str(path.relative_to(harness.ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_smi(query: str) -> str | None:
    """A reading, or why there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    done = subprocess.run([tool, f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True)
    return (done.stdout or done.stderr).strip() or None


def tool(name: str) -> str | None:
    """Path of a program of the CUDA toolkit."""
    return shutil.which(name) or shutil.which(name, path=str(Path("/usr/local/cuda/bin")))
