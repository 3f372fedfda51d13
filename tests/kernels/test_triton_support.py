"""The interpreter with its repairs computes bfloat16 as a GPU does, and `why_not` says what Triton can take."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from parrot_kernels import triton_support

pytestmark = pytest.mark.skipif(not triton_support.INTERPRETING, reason="about the interpreter")


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, count, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    at = index[:, None] * SIZE + index[None, :]
    total = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    for _ in range(count):
        a = tl.load(a_ptr + at, mask=index[:, None] < SIZE - 1, other=0.0)
        total = tl.dot(a, tl.load(b_ptr + at), total)
    tl.store(out_ptr + at, total)


@triton.jit
def _cast_kernel(x_ptr, out_ptr, wide_ptr, constant_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    narrow = tl.load(x_ptr + index).to(tl.bfloat16)
    tl.store(out_ptr + index, narrow)
    tl.store(wide_ptr + index, narrow.to(tl.float32))
    tl.store(constant_ptr + index, tl.full((SIZE,), 1.2345, tl.bfloat16))


@triton.jit
def _add_kernel(x_ptr, SIZE: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, SIZE))
    tl.store(x_ptr + tl.arange(0, SIZE), x + x)


@triton.jit
def _sum_kernel(x_ptr, SIZE: tl.constexpr):
    tl.store(x_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, SIZE)), axis=0))


def test_dot_of_bfloat16_sums_in_float32() -> None:
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    out = torch.empty(16, 16, dtype=torch.bfloat16)
    _dot_kernel[(1,)](a, b, out, 2, SIZE=16)
    a[-1] = 0
    assert torch.equal(out, (2 * (a.float() @ b.float())).bfloat16())


def test_casts_round_to_nearest_even() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 1024, dtype=np.uint32)
    bits[:6] = [0x3F808000, 0x3F818000, 0x3F807FFF, 0x7F7FFFFF, 0x7FC00001, 0xFF800000]  # ties, overflow, NaN, -inf
    x = torch.from_numpy(bits.view(np.float32))
    out, constant = torch.empty(1024, dtype=torch.bfloat16), torch.empty(1024, dtype=torch.bfloat16)
    wide = torch.empty(1024)
    _cast_kernel[(1,)](x, out, wide, constant, SIZE=1024)
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(wide, x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(constant, torch.full((1024,), 1.2345).bfloat16())


@pytest.mark.parametrize(("kernel", "name"), [(_add_kernel, "create_fadd"), (_sum_kernel, "ReduceOps")])
def test_other_arithmetic_on_bfloat16_is_refused(kernel, name: str) -> None:
    with pytest.raises(
        triton.runtime.errors.InterpreterError, match=f"{name} on bfloat16 or float8: convert to float32 first"
    ):
        kernel[(1,)](torch.ones(16, dtype=torch.bfloat16), SIZE=16)


def test_why_not() -> None:
    assert triton_support.why_not(torch.ones(2), 3, None) is None
    assert "got float64" in str(triton_support.why_not(torch.ones(2, dtype=torch.float64)))
    assert "got meta (TRITON_INTERPRET=1 is set)" in str(triton_support.why_not(torch.ones(2, device="meta")))
