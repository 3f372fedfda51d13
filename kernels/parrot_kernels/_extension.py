"""Loads the C++ extension `parrot_kernels._C` once, and says why it is missing when it is."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path

import torch
from torch import Tensor

_REBUILD = "rebuild with `pip install --no-build-isolation -e .`"


@functools.cache
def why_not() -> str | None:
    """None when `torch.ops.parrot_ext` is loaded and usable, else the reason. The first call loads it."""
    binaries = sorted(Path(__file__).parent.glob("_C.*"))
    if not binaries:
        return (
            "parrot_kernels was installed without its C++ extension (no C++ compiler, or PARROT_SKIP_EXTENSION=1): ops "
            f"use Triton or the PyTorch reference; with a compiler, {_REBUILD}"
        )
    try:
        torch.ops.load_library(str(binaries[0]))
    except OSError as error:
        return f"{binaries[0].name} does not load with torch {torch.__version__}: {error}; {_REBUILD}"
    return None


def why_not_loops(args: tuple[object, ...], *, op: str | None = None) -> str | None:
    """None when C++ loops over float32 or bfloat16 take these arguments, else the reason.

    Args:
        args: of an op.
        op: of the extension, if binaries that lack it may still be in use.
    """
    if reason := why_not():
        return reason
    if op is not None and not hasattr(torch.ops.parrot_ext, op):
        return f"the C++ extension was built before it had {op}; {_REBUILD}"
    for tensor in args:
        if isinstance(tensor, Tensor):
            if tensor.device.type != "cpu":
                return f"it needs CPU tensors, got {tensor.device.type}"
            if tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.bfloat16):
                return f"it needs float32 or bfloat16, got {tensor.dtype}"
    return None


def why_not_cuda() -> str | None:
    """None when the extension also holds compiled CUDA kernels, else the reason. Does not touch a device."""
    if reason := why_not():
        return reason
    if torch.ops.parrot_ext.has_cuda_kernels():
        return None
    # Written by setup.py beside the binary.
    why = importlib.import_module("parrot_kernels._build_info").why_no_cuda
    return (
        f"the C++ extension was built without CUDA kernels ({why}); with an nvcc >= 12.3 and PARROT_CUDA=1, {_REBUILD}"
    )
