"""What the CUDA back ends share: the reasons why one cannot run."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from parrot_kernels import _extension

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALIGNMENT = 16  # bytes of one memory access


@functools.cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def why_not(*args: object, dtypes: tuple[torch.dtype, ...] = DTYPES) -> str | None:
    """Needs the compiled kernels, and all tensors of `args` on one GPU of compute capability 9.0, floats in `dtypes`.

    Without tensors it says whether the kernels can run on this machine at all.
    """
    if torch.version.hip is not None:  # an AMD GPU may report Hopper's compute capability too
        return f"the kernels are for NVIDIA GPUs, this torch is built for ROCm {torch.version.hip}"
    if reason := _extension.why_not_cuda():
        return reason
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    for tensor in tensors:
        if tensor.device.type != "cuda":
            return f"it needs CUDA tensors, got {tensor.device.type}"
    devices = {tensor.device.index for tensor in tensors} or {torch.cuda.current_device()}
    if len(devices) > 1:
        return f"all tensors must be on one device, got cuda:{' and cuda:'.join(map(str, sorted(devices)))}"
    major, minor = _capability(devices.pop())
    if (major, minor) != (9, 0):
        return f"the kernels are compiled for compute capability 9.0 (Hopper), this device has {major}.{minor}"
    floats = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
    if wrong := [dtype for dtype in floats[:1] if dtype not in dtypes]:
        return f"it takes {', '.join(map(_name, dtypes))}, got {_name(wrong[0])}"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def why_not_aligned(width_name: str, width: int, tensor: Tensor) -> str | None:
    """Rows of `tensor` must be whole 16-byte vectors and start at multiples of 16 bytes."""
    vector = ALIGNMENT // tensor.element_size()
    if width % vector:
        return f"{width_name} must be a multiple of {vector} for {_name(tensor.dtype)}, got {width}"
    if tensor.data_ptr() % ALIGNMENT:
        return f"tensors must start at a multiple of {ALIGNMENT} bytes"
    return None
