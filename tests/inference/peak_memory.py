"""A program: loads a checkpoint and prints, as JSON, its peak resident memory over that of an idle process.

Usage: python -m tests.inference.peak_memory WARM_UP_CHECKPOINT CHECKPOINT DTYPE
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import torch

import parrot_sys


def _status(name: str) -> int:
    """A value of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def main(warm_up: str, checkpoint: str, dtype: str) -> None:
    # The libraries, their threads and the process groups are no part of the model.
    model, _ = parrot_sys.load_pretrained(warm_up, dtype=dtype)
    del model
    ctypes.CDLL(None).malloc_trim(0)  # what it left free would be taken first, unseen
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    model, _ = parrot_sys.load_pretrained(checkpoint, dtype=dtype)
    peak = _status("VmHWM") - before
    tensors = [*model.model.parameters(), *model.model.buffers()]
    weights = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    assert all(tensor.dtype == getattr(torch, dtype) for tensor in model.model.parameters())
    print(json.dumps({"peak": peak, "weights": weights}))


if __name__ == "__main__":
    main(*sys.argv[1:])
