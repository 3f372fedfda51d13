"""paged_attention against dense attention of each request in float64, on every back end."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from parrot_kernels.paged_attention import cpu_impl, triton_impl
from parrot_kernels.testing import assert_all_accurate
from parrot_sys.ops import paged_attention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALE = 0.35


@dataclass(frozen=True)
class Serving:
    """Requests (query rows, positions), and sizes."""

    requests: tuple[tuple[int, int], ...]
    heads: int = 2
    groups: int = 1
    width: int = 16
    block_size: int = 16
    columns: int | None = None
    hides: bool = False
    shared: int = 0
    """Blocks at the beginning that all requests share."""

    @property
    def num_rows(self) -> int:
        return sum(rows for rows, _ in self.requests)

    def inputs(self) -> dict[str, Tensor]:
        """Caches whose rows are NaN where no request has one, and tables that go through them in no order."""
        blocks_of = [max(-(-length // self.block_size) - self.shared, 0) for _, length in self.requests]
        order = torch.randperm(self.shared + sum(blocks_of) + 2)
        width = self.shared + max(blocks_of, default=0) + 1
        table = torch.full((len(self.requests), width), 2**30, dtype=torch.int32)  # never to be looked at
        table[:, : self.shared] = order[: self.shared]
        used = self.shared
        cache = torch.full((2, len(order), self.groups, self.block_size, self.width), torch.nan, dtype=torch.float64)
        for request, (count, (_, length)) in enumerate(zip(blocks_of, self.requests, strict=True)):
            table[request, self.shared : self.shared + count] = order[used : used + count]
            used += count
            for position in range(length):
                block = table[request, position // self.block_size]
                row = cache[:, block, :, position % self.block_size]
                row[row.isnan()] = torch.randn(int(row.isnan().sum()), dtype=torch.float64)
        rows = torch.tensor([0, *(rows for rows, _ in self.requests)]).cumsum(0)
        return {
            "query": torch.randn(self.num_rows, self.heads, self.width, dtype=torch.float64),
            "key_cache": cache[0],
            "value_cache": cache[1],
            "block_tables": table,
            "cu_seqlens_q": rows.int(),
            "kv_lengths": torch.tensor([length for _, length in self.requests], dtype=torch.int32),
            **({} if self.columns is None else {"columns": torch.randn(self.columns, 2, dtype=torch.float64)}),
            **({"visible": torch.rand(len(order), self.block_size) < 0.6} if self.hides else {}),
        }


CASES = {
    # An answer at its first row, within a block, at a block's end and after it; a prompt whole and in a later piece.
    "mixed": Serving(((1, 1), (1, 7), (1, 16), (1, 17), (20, 20), (5, 38))),
    "grouped": Serving(((1, 33), (3, 20)), heads=14, groups=2, width=8),
    "all_heads": Serving(((1, 40), (9, 9)), heads=3, groups=3, width=24, block_size=32),
    "primes": Serving(((1, 13), (7, 29)), heads=3, width=7),
    "shared": Serving(((2, 34), (1, 35), (2, 40)), shared=2),
    "columns": Serving(((1, 30), (6, 22)), heads=4, groups=2, columns=40),
    "few_columns": Serving(((1, 30), (6, 22)), columns=19),  # positions without a column add nothing
    "hidden": Serving(((1, 30), (6, 22), (1, 1), (1, 2), (1, 3)), heads=4, groups=2, hides=True, columns=30),
    "no_query_row": Serving(((0, 5), (1, 6), (0, 0))),
    "no_row": Serving(((0, 5),), columns=8),
    "no_request": Serving(()),
    "one_row": Serving(((1, 1),), heads=1, width=1),
}


def plain(inputs: dict[str, Tensor], case: Serving, dtype: torch.dtype) -> dict[str, Tensor]:
    """Attention of each request over a copy of its rows."""
    tensors = {name: own.to(dtype) if own.is_floating_point() else own for name, own in inputs.items()}
    acc = torch.promote_types(dtype, torch.float32)
    outs, extras = [tensors["query"][:0]], [torch.zeros(0, 2, dtype=acc)]
    for request, (count, length) in enumerate(case.requests):
        start = int(inputs["cu_seqlens_q"][request])
        query = tensors["query"][start : start + count].transpose(0, 1)
        places = torch.arange(length)
        blocks, rows = inputs["block_tables"][request].long()[places // case.block_size], places % case.block_size
        key, value = (
            tensors[name][blocks, :, rows].repeat_interleave(case.heads // case.groups, 1).transpose(0, 1)
            for name in ("key_cache", "value_cache")
        )
        seen = places <= (length - count + torch.arange(count))[:, None]
        if case.hides:
            seen = seen & inputs["visible"][blocks, rows]
        scores = (query @ key.mT * SCALE).masked_fill(~seen, -torch.inf)
        weights = scores.softmax(-1).masked_fill(~seen, 0.0)
        outs.append((weights @ value).transpose(0, 1))
        if case.columns is not None:
            columns = tensors["columns"][:length].to(acc)
            columns = torch.cat((columns, columns.new_zeros(length - len(columns), 2)))
            extras.append((weights.to(acc) @ columns).sum(0))
    return {"out": torch.cat(outs), "extra": torch.cat(extras)}


def check(case: Serving, dtype: torch.dtype, device: torch.device | str) -> None:
    inputs = case.inputs()
    rounded = {name: own.to(dtype).double() if own.is_floating_point() else own for name, own in inputs.items()}
    moved = {
        name: (own.to(dtype) if own.is_floating_point() else own).to(device, copy=True) for name, own in rounded.items()
    }
    longest = max((rows for rows, _ in case.requests), default=0)
    out, extra = paged_attention(**moved, max_seqlen_q=longest, scale=SCALE)
    assert out.dtype == dtype
    exact, same_dtype = plain(rounded, case, torch.float64), plain(rounded, case, dtype)
    actual = {"out": out.cpu()}
    if case.columns is None:
        assert extra is None
        del exact["extra"], same_dtype["extra"]
    else:
        assert extra is not None
        assert extra.dtype == torch.float32
        actual["extra"] = extra.cpu()
    same_dtype = {name: own.to(dtype) for name, own in same_dtype.items()}
    assert_all_accurate(actual, exact, same_dtype)


@pytest.mark.parametrize(
    ("backend", "dtype", "case"),
    [
        pytest.param(backend, dtype, case, id=f"{backend}-{dtype}-{case}")
        for backend in ("reference", "cpu", "triton")
        for dtype in DTYPES
        for case in CASES
        if (backend, dtype) != ("cpu", "fp16")
        if backend != "triton" or dtype == "bf16" or case in ("mixed", "hidden")  # the interpreter is slow
    ],
)
def test_matches_float64(ran_on, device_of, backend: str, dtype: str, case: str) -> None:
    with ran_on(backend, "paged_attention", "paged_attention"):
        check(CASES[case], DTYPES[dtype], device_of(backend))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_requests_on_the_cpu(ran_on, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 90)), max_size=4))
    groups = data.draw(st.integers(1, 3))
    case = Serving(
        tuple((rows, rows + before) for rows, before in lengths),
        heads=groups * data.draw(st.integers(1, 20)),
        groups=groups,
        width=data.draw(st.integers(1, 40)),
        block_size=data.draw(st.integers(1, 40)),
        columns=data.draw(st.none() | st.integers(0, 120)),
        hides=data.draw(st.booleans()),
    )
    with ran_on("cpu", "paged_attention", "paged_attention"):
        check(case, torch.float32, "cpu")


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_requests_on_triton(ran_on, triton_device: torch.device, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 40)), max_size=3))
    case = Serving(
        tuple((rows, rows + before) for rows, before in lengths),
        heads=data.draw(st.sampled_from([2, 6])),
        groups=2,
        width=data.draw(st.integers(1, 40)),
        columns=data.draw(st.none() | st.integers(0, 60)),
        hides=data.draw(st.booleans()),
    )
    with ran_on("triton", "paged_attention", "paged_attention"):
        check(case, torch.bfloat16, triton_device)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_a_row_does_not_depend_on_the_other_requests_or_on_its_blocks(ran_on, device_of, backend: str) -> None:
    case = CASES["hidden"]
    inputs = {
        name: (own.float() if own.is_floating_point() else own).to(device_of(backend))
        for name, own in case.inputs().items()
    }
    with ran_on(backend, "paged_attention", "paged_attention"):
        out, _ = paged_attention(**inputs, max_seqlen_q=6, scale=SCALE)
        order = torch.randperm(len(inputs["key_cache"]))
        moved = dict(inputs)
        for name in ("key_cache", "value_cache", "visible"):
            moved[name] = torch.empty_like(inputs[name])
            moved[name][order] = inputs[name]
        used = inputs["block_tables"] < len(order)
        moved["block_tables"] = torch.where(
            used, order[inputs["block_tables"].clamp(max=len(order) - 1).long()].int(), 0
        )
        again, _ = paged_attention(**moved, max_seqlen_q=6, scale=SCALE)
        alone = {**inputs, "query": inputs["query"][1:7], "block_tables": inputs["block_tables"][1:2]}
        alone |= {"cu_seqlens_q": torch.tensor([0, 6], dtype=torch.int32), "kv_lengths": inputs["kv_lengths"][1:2]}
        own, _ = paged_attention(**alone, max_seqlen_q=6, scale=SCALE)
    assert torch.equal(out, again)
    torch.testing.assert_close(own, out[1:7], rtol=1e-6, atol=1e-6)


def test_errors() -> None:
    inputs = {name: own.float() if own.is_floating_point() else own for name, own in CASES["mixed"].inputs().items()}
    sizes = {"max_seqlen_q": 20, "scale": SCALE}
    cache = torch.zeros(4, 3, 16, 16)
    with pytest.raises(ValueError, match="multiple of key heads, got 2 and 3"):
        paged_attention(**{**inputs, "key_cache": cache, "value_cache": cache}, **sizes)
    with pytest.raises(ValueError, match=r"must have shape \[blocks, heads, rows, 16\]"):
        paged_attention(**{**inputs, "value_cache": inputs["value_cache"][..., :3]}, **sizes)
    with pytest.raises(ValueError, match=r"columns must have shape \[positions, 2\], got \[3\]"):
        paged_attention(**inputs, columns=torch.zeros(3), **sizes)


@pytest.mark.skipif(cpu_impl.why_not() is not None, reason="the C++ extension is not built")
def test_the_cpu_back_end_reads_nothing_outside_the_cache() -> None:
    inputs = {name: own.float() if own.is_floating_point() else own for name, own in CASES["mixed"].inputs().items()}
    sizes = {"max_seqlen_q": 20, "scale": SCALE}
    for changed, message in (
        ({"block_tables": inputs["block_tables"].clone().fill_(99)}, r"must be in \[0, .*, got 99"),
        ({"kv_lengths": inputs["kv_lengths"] * 100}, "positions in a table of"),
        ({"kv_lengths": torch.zeros_like(inputs["kv_lengths"])}, "query rows and 0 positions"),
        ({"cu_seqlens_q": inputs["cu_seqlens_q"] + 1}, "cu_seqlens_q must go from 0 to"),
    ):
        with pytest.raises(RuntimeError, match=message):
            paged_attention(**{**inputs, **changed}, **sizes)


def test_blocks_that_the_tensor_cores_cannot_take(triton_device: torch.device) -> None:
    case = replace(CASES["mixed"], block_size=24)
    inputs = [own.float().to(triton_device) for own in case.inputs().values()]
    assert "16, 32, 64 or more rows, a power of two, got 24" in (triton_impl.why_not(*inputs) or "")
