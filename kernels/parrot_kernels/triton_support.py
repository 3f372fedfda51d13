"""What Triton launchers share: when they can run, what size of machine they plan for, and a correct interpreter.

Importing this under TRITON_INTERPRET=1 repairs Triton's interpreter, so a `triton_impl` that imports it cannot be
tested without the repairs. Nothing here needs a GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from parrot_kernels import env

INTERPRETING = env.triton_interpret()
DEVICE = "cpu" if INTERPRETING else "cuda"
_HINT = "TRITON_INTERPRET=1 is set" if INTERPRETING else "TRITON_INTERPRET=1 runs it on CPU tensors, for tests"
# What launches are planned for where there is no GPU to ask: an H100 or H200 when compiling only; in the interpreter a
# few, since its programs run one after the other.
_COMPILE_ONLY_PROCESSORS, _INTERPRETER_PROCESSORS = 132, 4


def why_not(*args: object) -> str | None:
    """None when Triton kernels can run on these arguments, else the reason; every `triton_impl.why_not` asks it first.

    They take CUDA tensors where there is a GPU, and CPU tensors in the interpreter. (The registry adds that `auto`
    never picks Triton for CPU tensors.) Kernels accumulate in float32, so float64 is refused.
    """
    fits, on_cuda, too_wide = INTERPRETING, DEVICE == "cuda", torch.float64
    for tensor in args:
        if isinstance(tensor, Tensor):
            if not (tensor.is_cuda if on_cuda else tensor.is_cpu):
                return f"it needs {DEVICE} tensors, got {tensor.device.type} ({_HINT})"
            if tensor.dtype is too_wide:
                return "it computes in float32, got float64"
            fits = True
    return None if fits or torch.cuda.is_available() else f"it needs a CUDA device ({_HINT})"


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of `device`: how many programs run at the same time when each fills one."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return _INTERPRETER_PROCESSORS if INTERPRETING else _COMPILE_ONLY_PROCESSORS


# Repairs of the interpreter. It keeps bfloat16 as uint16, and Triton 3.6 and 3.9 then multiply, add and compare those
# integers and truncate where they should round: wrong results without a word. It keeps float8 as uint8,
# and truncates where it casts to it.

_Handle = interpreter.TensorHandle
_FORMATS = "bfloat16 or float8"
_ARITHMETIC = ("create_f", "create_min", "create_max", "create_clampf", "create_precise")
_NOT_ARITHMETIC = ("create_fp_to_fp", "create_fp_ext", "create_fp_trunc", "create_fp_to_si", "create_fp_to_ui")


def _is_storage(value: object) -> bool:
    """Whether this is a handle of a format that is stored but not calculated with."""
    return isinstance(value, _Handle) and value.dtype.scalar in (tl.bfloat16, tl.float8e4nv)


def _to_float32(handle: Any) -> Any:
    """A handle of bfloat16 or float8 as float32, exactly; any other as it is."""
    if not _is_storage(handle):
        return handle
    if handle.dtype.scalar == tl.float8e4nv:
        values = torch.from_numpy(np.array(handle.data)).view(torch.float8_e4m3fn).float()
        return _Handle(values.numpy(), tl.float32)
    return _Handle((handle.data.astype(np.uint32) << np.uint32(16)).view(np.float32), tl.float32)


def _round_to_fp8(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of e4m3, to nearest even; what is too large becomes the largest number, as on the device."""
    limits = torch.finfo(torch.float8_e4m3fn)
    rounded = torch.from_numpy(np.array(values, np.float32)).clamp(limits.min, limits.max).to(torch.float8_e4m3fn)
    return rounded.view(torch.uint8).numpy()


def _round_to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, to nearest even as the hardware does; NaN becomes the quiet NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16)).reshape(np.shape(values))


def _refusing_storage(name: str, operation: Any) -> Any:
    """`operation` with a TypeError in place of wrong results of bfloat16 and float8: kernels compute in float32."""

    @functools.wraps(operation)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(map(_is_storage, args)):
            raise TypeError(f"{name} on {_FORMATS}: convert to float32 first")
        return operation(self, *args, **kwargs)

    return checked


def _repair_casts(builder: Any) -> None:
    cast, fp_to_fp = builder.cast_impl, builder.create_fp_to_fp

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if dst_type.scalar == tl.bfloat16:
            data = src.data if src.dtype.scalar == tl.bfloat16 else _round_to_bf16(_to_float32(src).data)
            return _Handle(data, tl.bfloat16)
        if dst_type.scalar == tl.float8e4nv:
            data = src.data if src.dtype.scalar == tl.float8e4nv else _round_to_fp8(_to_float32(src).data)
            return _Handle(data, tl.float8e4nv)
        src = _to_float32(src)
        return src if dst_type.scalar == src.dtype.scalar else cast(self, src, dst_type)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if {tl.bfloat16, tl.float8e4nv} & {src.dtype.scalar, dst_type.scalar}:
            return cast_impl(self, src, dst_type)
        return fp_to_fp(self, src, dst_type, rounding_mode)

    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp


def _repair_reductions(interface: Any) -> None:
    apply = interface.apply

    def checked(self: Any, values: Any) -> Any:
        if any(_is_storage(value.handle) for value in (values if isinstance(values, tuple) else (values,))):
            raise TypeError(f"{type(self).__name__} on {_FORMATS}: convert to float32 first")
        return apply(self, values)

    interface.apply = checked


def _repair_masks(builder: Any) -> None:
    """A broadcast comparison of scalars becomes integers, which loads and stores of Triton 3.9 refuse as masks."""
    load, store = builder.create_masked_load, builder.create_masked_store

    def as_bool(mask: Any) -> Any:
        return _Handle(mask.data.astype(bool), tl.int1) if isinstance(mask, _Handle) else mask

    def create_masked_load(self: Any, ptrs: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        return load(self, ptrs, as_bool(mask), *args, **kwargs)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        return store(self, ptrs, value, as_bool(mask), *args, **kwargs)

    builder.create_masked_load, builder.create_masked_store = create_masked_load, create_masked_store


def _repair_range() -> None:
    """`range(tensor)` on Triton 3.6 with numpy >= 2.4, where int() of an array with one element raises."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).squeeze()))

    interpreter._patch_lang_tensor = patched


@functools.cache
def install_interpreter_fixes() -> None:
    """Repairs the interpreter: bfloat16, float8 (casts, constants, `tl.dot`; other arithmetic raises), masks, ranges.

    Raising, not widening, keeps the rule that kernels follow: these are storage formats, arithmetic is float32.
    """
    builder = interpreter.InterpreterBuilder
    for name in dir(builder):
        if name.startswith(_ARITHMETIC) and name not in _NOT_ARITHMETIC:
            setattr(builder, name, _refusing_storage(name, getattr(builder, name)))
    dot = builder.create_dot
    builder.create_dot = lambda self, a, b, *rest: dot(self, _to_float32(a), _to_float32(b), *rest)
    builder.get_bf16 = lambda self, value: _Handle(_round_to_bf16(np.array([value], np.float32)), tl.bfloat16)
    _repair_casts(builder)
    _repair_masks(builder)
    _repair_reductions(interpreter.ReduceOps)
    _repair_reductions(interpreter.ScanOps)
    _repair_range()


if INTERPRETING:
    install_interpreter_fixes()
