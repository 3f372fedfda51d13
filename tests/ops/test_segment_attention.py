"""segment_attention: outputs and gradients against dense masked float64 attention, on every back end."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from parrot_kernels import ranged_attention
from parrot_kernels.segment_attention import cpu_impl, reference, triton_impl
from parrot_kernels.testing import assert_all_accurate, outputs_and_gradients
from parrot_sys.ops import segment_attention

LAUNCHERS = ("segment_attention_fwd", "segment_attention_bwd")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALE = 0.35


@dataclass(frozen=True)
class Text:
    """Runs of rows (count, first key, one past the last key), and sizes."""

    runs: tuple[tuple[int, int, int], ...]
    num_keys: int
    heads: int = 2
    kv_heads: int = 1
    width: int = 16

    @property
    def segments(self) -> tuple[Tensor, Tensor]:
        counts = torch.tensor([run[0] for run in self.runs], dtype=torch.int64)
        start, end = (torch.tensor([run[i] for run in self.runs], dtype=torch.int32) for i in (1, 2))
        return start.repeat_interleave(counts), end.repeat_interleave(counts)

    def inputs(self) -> dict[str, Tensor]:
        num_rows = sum(run[0] for run in self.runs)
        return {
            "query": torch.randn(num_rows, self.heads, self.width, dtype=torch.float64),
            "key": torch.randn(self.num_keys, self.kv_heads, self.width, dtype=torch.float64),
            "value": torch.randn(self.num_keys, self.kv_heads, self.width, dtype=torch.float64),
        }


CASES = {
    # Rows before the first image, three images of 17 tokens, rows that see none (the interpreter has 16 x 32 tiles).
    "images": Text(((3, 0, 0), (7, 0, 17), (9, 17, 34), (2, 34, 34), (18, 34, 51)), 51),
    "one_memory": Text(((20, 5, 38),), 40, heads=3, kv_heads=3),  # keys at both ends that no row sees
    "causal_memory": Text(tuple((1, 0, i + 1) for i in range(19)), 19),  # row i sees the memory up to itself
    "grouped": Text(((6, 0, 9), (5, 9, 21)), 21, heads=4, kv_heads=2, width=24),
    "primes": Text(((13, 0, 11), (3, 11, 18)), 18, heads=3, width=7),
    "backwards": Text(((5, 8, 12), (0, 0, 0), (6, 0, 8), (2, 9, 3), (1, 4, 12)), 12),  # any order, ends before starts
    "sees_nothing": Text(((4, 0, 0),), 3),
    "no_key": Text(((4, 0, 0),), 0),
    "no_row": Text((), 3),
    "one_row": Text(((1, 0, 1),), 1),
}


def plain(leaves: dict[str, Tensor], text: Text) -> dict[str, Tensor]:
    """Dense masked attention in the dtype of the leaves."""
    repeat = text.heads // text.kv_heads
    query = leaves["query"].transpose(0, 1)
    key, value = (leaves[name].repeat_interleave(repeat, 1).transpose(0, 1) for name in ("key", "value"))
    start, end = text.segments
    keys = torch.arange(text.num_keys)
    unseen = (keys < start[:, None]) | (keys >= end[:, None])
    scores = (query @ key.mT * SCALE).masked_fill(unseen, float("-inf"))
    weights = scores.softmax(2).masked_fill(unseen, 0.0)
    return {"out": (weights @ value).transpose(0, 1), "lse": scores.logsumexp(2)}


def fused(leaves: dict[str, Tensor], text: Text) -> dict[str, Tensor]:
    """The op on `leaves`, results on the CPU."""
    start, end = (own.to(leaves["query"].device) for own in text.segments)
    out, lse = segment_attention(**leaves, kv_start=start, kv_end=end, scale=SCALE)
    return {"out": out.cpu(), "lse": lse.cpu()}


def check(text: Text, dtype: torch.dtype, device: torch.device | str) -> None:
    inputs = {name: value.to(dtype).double() for name, value in text.inputs().items()}
    on_device = {name: value.to(device) for name, value in inputs.items()}
    actual = outputs_and_gradients(lambda leaves: fused(leaves, text), on_device, dtype)
    assert actual["out"].dtype == dtype
    assert actual["lse"].dtype == torch.float32
    exact = outputs_and_gradients(lambda leaves: plain(leaves, text), inputs, torch.float64)
    same_dtype = outputs_and_gradients(lambda leaves: plain(leaves, text), inputs, dtype)
    assert_all_accurate({name: value.cpu() for name, value in actual.items()}, exact, same_dtype)


def runs(backend: str, dtype: str, case: str) -> bool:
    """The interpreter is slow: one dtype has all cases."""
    return backend != "triton" or dtype == "bf16" or case in ("images", "causal_memory")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranged_attention, "BLOCK_ROWS", 8)


@pytest.mark.parametrize(
    ("backend", "dtype", "case"),
    [
        pytest.param(backend, dtype, case, id=f"{backend}-{dtype}-{case}")
        for backend in ("reference", "cpu", "triton")
        for dtype in DTYPES
        for case in CASES
        if runs(backend, dtype, case)
    ],
)
def test_matches_float64(ran_on, device_of, backend: str, dtype: str, case: str) -> None:
    with ran_on(backend, "segment_attention", *LAUNCHERS):
        check(CASES[case], DTYPES[dtype], device_of(backend))


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_ragged_segments_on_triton(ran_on, triton_device: torch.device, data: st.DataObject) -> None:
    num_keys = data.draw(st.integers(0, 70))
    key = st.integers(0, num_keys)
    spans = data.draw(st.lists(st.tuples(st.integers(0, 25), key, key), max_size=4))
    text = Text(tuple(spans), num_keys, heads=data.draw(st.integers(1, 3)), width=data.draw(st.integers(1, 40)))
    with ran_on("triton", "segment_attention", *LAUNCHERS):
        check(text, torch.bfloat16, triton_device)


@pytest.mark.parametrize("impl", [reference, cpu_impl, triton_impl], ids=["reference", "cpu", "triton"])
@pytest.mark.parametrize("wanted", range(3))
def test_computes_only_what_is_needed(impl, wanted: int, triton_device: torch.device) -> None:
    device = triton_device if impl is triton_impl else torch.device("cpu")
    text = CASES["grouped"]
    args = [value.float().to(device) for value in text.inputs().values()] + [own.to(device) for own in text.segments]
    out, lse = impl.segment_attention_fwd(*args, SCALE)
    grads = torch.randn_like(out), torch.randn_like(lse)
    full = impl.segment_attention_bwd(*grads, *args, out, lse, SCALE, (True,) * 3)
    some = impl.segment_attention_bwd(*grads, *args, out, lse, SCALE, tuple(i == wanted for i in range(3)))
    for i, (own, all_of_it) in enumerate(zip(some, full, strict=True)):
        assert torch.equal(own, all_of_it) if i == wanted else own.shape == (0,)


def test_gradcheck() -> None:
    text = Text(((2, 0, 3), (1, 0, 0), (3, 2, 5)), 5, width=3)
    leaves = {name: value.requires_grad_() for name, value in text.inputs().items()}
    start, end = text.segments

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = segment_attention(*values, start, end, scale=SCALE)
        return out, lse[:, start < end]  # (the others are infinite)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


def test_errors() -> None:
    query, start = torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="multiple of key heads, got 3 and 2"):
        segment_attention(query, query[:, :2], query[:, :2], start, start, scale=1.0)
    assert "at most 128 columns, got 129" in (triton_impl.why_not(torch.zeros(1, 1, 129)) or "")
