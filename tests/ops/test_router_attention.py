"""router_attention: outputs and gradients against dense float64 attention, sample by sample, on every back end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from parrot_kernels import attention_tiles, ranged_attention, triton_support
from parrot_kernels.router_attention import cpu_impl, reference, triton_impl
from parrot_kernels.testing import assert_accurate, assert_all_accurate, outputs_and_gradients
from parrot_sys.ops import router_attention, router_attention_parts

LAUNCHERS = ("router_attention_fwd", "router_attention_bwd")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALE = 0.35


@dataclass(frozen=True)
class Pack:
    """Query rows of each sample, its key rows where they differ, and sizes."""

    rows: tuple[int, ...]
    keys: tuple[int, ...] | None = None
    heads: int = 2
    kv_heads: int = 1
    width: int = 16
    columns: int = 64

    @property
    def lengths(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.rows, self.rows if self.keys is None else self.keys

    def inputs(self) -> dict[str, Tensor]:
        num_rows, num_keys = map(sum, self.lengths)
        return {
            "query": torch.randn(num_rows, self.heads, self.width, dtype=torch.float64),
            "key": torch.randn(num_keys, self.kv_heads, self.width, dtype=torch.float64),
            "value": torch.randn(num_keys, self.kv_heads, self.width, dtype=torch.float64),
            "columns": torch.randn(self.columns, 2, dtype=torch.float64),
        }


CASES = {
    "packed": Pack((17, 1, 36)),  # in the interpreter tiles are 16 x 32: whole, cut and masked ones
    "every_head": Pack((20,), heads=3, kv_heads=3),
    "grouped": Pack((5, 18), heads=4, kv_heads=2, width=24),  # a width that is no power of two
    "cache": Pack((1, 3), (33, 20)),  # decoding: the last query row sees every key
    "primes": Pack((19, 2), heads=3, width=7, columns=19),
    "empty_samples": Pack((0, 6, 0, 0, 3), (4, 6, 0, 0, 3)),
    "no_key": Pack((2, 3), (0, 3)),  # rows that see nothing
    "more_rows": Pack((5,), (3,)),  # the first two rows stand before every key
    "strips": Pack((100,), heads=4, kv_heads=2, columns=100),  # two programs a head, each with two tiles of keys
    "one_row": Pack((1,), columns=1),
    "no_row": Pack((0,)),
}


def boundaries(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def plain(leaves: dict[str, Tensor], pack: Pack) -> dict[str, Tensor]:
    """Dense attention in the dtype of the leaves."""
    parts = []
    for (q0, q1), (k0, k1) in zip(*(pairwise(boundaries(own).tolist()) for own in pack.lengths), strict=True):
        repeat = pack.heads // pack.kv_heads
        query = leaves["query"][q0:q1].transpose(0, 1)
        key, value = (leaves[name][k0:k1].repeat_interleave(repeat, 1).transpose(0, 1) for name in ("key", "value"))
        rows, keys = torch.arange(q1 - q0)[:, None], torch.arange(k1 - k0)
        unseen = keys > rows + (k1 - k0) - (q1 - q0)
        scores = (query @ key.mT * SCALE).masked_fill(unseen, float("-inf"))
        weights = scores.softmax(2).masked_fill(unseen, 0.0)
        extra = weights.sum(0) @ leaves["columns"][: k1 - k0]
        parts.append(((weights @ value).transpose(0, 1), extra, scores.logsumexp(2).T))
    out, extra, lse = (torch.cat(part) for part in zip(*parts, strict=True))
    return {"out": out, "extra": extra, "lse": lse.T}


def fused(leaves: dict[str, Tensor], pack: Pack) -> dict[str, Tensor]:
    """The op on `leaves`, results on the CPU."""
    device = leaves["query"].device
    rows, keys = pack.lengths
    out, extra, lse = router_attention(
        **leaves,
        cu_seqlens_q=boundaries(rows, device),
        cu_seqlens_kv=boundaries(keys, device),
        max_seqlen_q=max(rows),
        max_seqlen_kv=max(keys),
        scale=SCALE,
    )
    return {"out": out.cpu(), "extra": extra.cpu(), "lse": lse.cpu()}


def check(pack: Pack, dtype: torch.dtype, device: torch.device | str) -> None:
    inputs = {name: value.to(dtype).double() for name, value in pack.inputs().items()}
    on_device = {name: value.to(device) for name, value in inputs.items()}
    actual = outputs_and_gradients(lambda leaves: fused(leaves, pack), on_device, dtype)
    assert actual["out"].dtype == dtype
    assert actual["extra"].dtype == actual["lse"].dtype == torch.float32
    exact = outputs_and_gradients(lambda leaves: plain(leaves, pack), inputs, torch.float64)
    same_dtype = outputs_and_gradients(lambda leaves: plain(leaves, pack), inputs, dtype)
    assert_all_accurate({name: value.cpu() for name, value in actual.items()}, exact, same_dtype)


def runs(backend: str, dtype: str, case: str) -> bool:
    """The interpreter is slow: one dtype has all cases."""
    return backend != "triton" or dtype == "bf16" or case in ("packed", "cache")


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
    with ran_on(backend, "router_attention", *LAUNCHERS):
        check(CASES[case], DTYPES[dtype], device_of(backend))


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.tuples(st.integers(0, 35), st.integers(0, 40)), min_size=1, max_size=4),
    group=st.integers(1, 3),
    width=st.integers(1, 40),
)
def test_ragged_packs_on_triton(ran_on, triton_device: torch.device, lengths, group: int, width: int) -> None:
    rows, keys = zip(*lengths, strict=True)
    pack = Pack(rows, keys, heads=group, width=width)
    with ran_on("triton", "router_attention", *LAUNCHERS):
        check(pack, torch.bfloat16, triton_device)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_slices_of_the_keys_combine(ran_on, device_of, backend: str) -> None:
    """Context parallelism: each rank attends to its part of the keys, and the parts are combined by their lse."""
    pack = Pack((37,), heads=2)
    bounds = (0, 10, 25, 37)
    device = device_of(backend)
    dtype = torch.float32

    def combined(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        lengths = {"cu_seqlens_q": boundaries((37,), device), "max_seqlen_q": 37, "max_seqlen_kv": 15, "scale": SCALE}
        parts = [
            router_attention_parts(
                leaves["query"],
                leaves["key"][start:stop],
                leaves["value"][start:stop],
                leaves["columns"],
                cu_seqlens_kv=boundaries((stop - start,), device),
                positions=torch.tensor([[0, start]], dtype=torch.int32, device=device),
                **lengths,
            )
            for start, stop in pairwise(bounds)
        ]
        outs, extras, lses = (torch.stack(part).cpu() for part in zip(*parts, strict=True))
        # Rows before a part see none of it.
        assert torch.equal(lses[1].isinf(), (torch.arange(37) < 10).expand(2, -1))
        weights = lses.softmax(0)
        out = (outs * weights.transpose(1, 2)[..., None]).sum(0)
        return {"out": out, "extra": (extras * weights[..., None]).sum((0, 1)), "lse": lses.logsumexp(0)}

    inputs = pack.inputs()
    with ran_on(backend, "router_attention", *LAUNCHERS):
        actual = outputs_and_gradients(combined, {name: value.to(device) for name, value in inputs.items()}, dtype)
    exact = outputs_and_gradients(lambda leaves: plain(leaves, pack), inputs, torch.float64)
    same_dtype = outputs_and_gradients(lambda leaves: plain(leaves, pack), inputs, dtype)
    assert_all_accurate({name: value.cpu() for name, value in actual.items()}, exact, same_dtype)


@pytest.mark.parametrize("impl", [reference, cpu_impl, triton_impl], ids=["reference", "cpu", "triton"])
def test_positions_without_columns_add_nothing(impl, triton_device: torch.device) -> None:
    device = triton_device if impl is triton_impl else torch.device("cpu")
    pack = Pack((12,))
    tensors = {name: value.float().to(device) for name, value in pack.inputs().items()}
    query, key, value, columns = tensors.values()
    lengths = boundaries((12,), device), boundaries((12,), device)
    positions = torch.tensor([[-3, -3]], dtype=torch.int32, device=device)
    few, padded = columns[:5], torch.cat((columns.new_zeros(3, 2), columns[:5], columns.new_zeros(4, 2)))
    shifted = (query, key, value, few, *lengths, positions)
    whole = (query, key, value, padded, *lengths, None)
    sizes = (12, 12, SCALE)
    results = impl.router_attention_fwd(*shifted, *sizes)
    wanted = impl.router_attention_fwd(*whole, *sizes)
    assert all(map(torch.equal, results, wanted))
    grads = [torch.randn_like(result) for result in results]
    *_, grad = impl.router_attention_bwd(*grads, *shifted, *results, *sizes, (False, False, False, True))
    *_, wanted_grad = impl.router_attention_bwd(*grads, *whole, *results, *sizes, (False, False, False, True))
    assert grad.shape == (5, 2)
    torch.testing.assert_close(grad, wanted_grad[3:8])


@pytest.mark.parametrize("impl", [reference, cpu_impl, triton_impl], ids=["reference", "cpu", "triton"])
@pytest.mark.parametrize("wanted", range(4))
def test_computes_only_what_is_needed(impl, wanted: int, triton_device: torch.device) -> None:
    device = triton_device if impl is triton_impl else torch.device("cpu")
    tensors = [value.float().to(device) for value in Pack((9,), heads=2).inputs().values()]
    args = (*tensors, boundaries((9,), device), boundaries((9,), device), None)
    out, extra, lse = impl.router_attention_fwd(*args, 9, 9, SCALE)
    grads = torch.randn_like(out), torch.randn_like(extra[:1]).expand_as(extra), torch.randn_like(lse)
    results = (out, extra, lse, 9, 9, SCALE)
    full = impl.router_attention_bwd(*grads, *args, *results, (True,) * 4)
    some = impl.router_attention_bwd(*grads, *args, *results, tuple(i == wanted for i in range(4)))
    for i, (own, all_of_it) in enumerate(zip(some, full, strict=True)):
        assert torch.equal(own, all_of_it) if i == wanted else own.shape == (0,)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("used", [0, 1, 2])
def test_outputs_that_nobody_uses(ran_on, device_of, backend: str, used: int) -> None:
    """The gradient of one output alone; query, key and value are parts of one fused projection."""
    pack = Pack((19,), heads=2)
    device = device_of(backend)
    columns = pack.inputs()["columns"].float()
    qkv = torch.randn(19, 4, 16)

    def one(function, qkv: Tensor, columns: Tensor) -> list[Tensor]:
        leaves = [qkv.clone().requires_grad_(), columns.clone().requires_grad_()]
        query, key, value = leaves[0].split((2, 1, 1), dim=1)
        outputs = function({"query": query, "key": key, "value": value, "columns": leaves[1]}, pack)
        output = list(outputs.values())[used]
        torch.manual_seed(1)
        grads = torch.autograd.grad(output, leaves, torch.randn(output.shape).to(output.dtype), materialize_grads=True)
        return [output.detach(), *(grad.cpu() for grad in grads)]

    with ran_on(backend, "router_attention", *LAUNCHERS):
        actual = one(fused, qkv.to(device), columns.to(device))
    exact, same_dtype = one(plain, qkv.double(), columns.double()), one(plain, qkv, columns)
    for name, *values in zip(("output", "grad_qkv", "grad_columns"), actual, exact, same_dtype, strict=True):
        assert_accurate(name, *values)


@pytest.mark.parametrize("processors", [1, 2, 8])
def test_strips_of_keys_change_only_the_order_of_one_sum(
    monkeypatch: pytest.MonkeyPatch, triton_device: torch.device, processors: int
) -> None:
    """Few heads on many processors: several programs a head add to the query's gradient, each to parts of its own."""
    pack = Pack((70,), heads=1, columns=70)
    tensors = [value.to(triton_device, torch.bfloat16) for value in pack.inputs().values()]
    args = (*tensors, boundaries((70,), triton_device), boundaries((70,), triton_device), None)
    results = triton_impl.router_attention_fwd(*args, 70, 70, SCALE)
    grads = [torch.ones_like(result) for result in results]
    backward = (*grads, *args, *results, 70, 70, SCALE, (True,) * 4)
    monkeypatch.setattr(triton_support, "num_processors", lambda device: processors)
    strips = []

    def by_strips(*sizes: object) -> object:
        found = attention_tiles.by_strips(*sizes)
        strips.append(found[1])
        return found

    tiles = SimpleNamespace(**{**vars(attention_tiles), "by_strips": by_strips})
    wanted = reference.router_attention_bwd(*backward)
    monkeypatch.setattr(triton_impl, "tiles", tiles)
    first, second = (triton_impl.router_attention_bwd(*backward) for _ in range(2))
    assert strips == [min(2 * processors, 3)] * 2 if triton_support.INTERPRETING else strips[0] == strips[1]
    for name, own, again, other in zip(pack.inputs(), first, second, wanted, strict=True):
        assert torch.equal(own, again), name
        torch.testing.assert_close(own, other, rtol=2**-6, atol=2**-6 * float(other.abs().max()), msg=name)


def test_cpu_memory_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of the CPU back end is larger than the weights of one block of rows."""
    monkeypatch.setattr(ranged_attention, "BLOCK_ROWS", 16)
    pack = Pack((128,), heads=2, columns=128)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                largest = max(largest, tensor.numel() if isinstance(tensor, Tensor) else 0)
            return out

    args = (*pack.inputs().values(), boundaries((128,)), boundaries((128,)), None)
    with Watch():
        results = cpu_impl.router_attention_fwd(*args, 128, 128, SCALE)
        grads = map(torch.ones_like, results)
        cpu_impl.router_attention_bwd(*grads, *args, *results, 128, 128, SCALE, (True,) * 4)
    assert largest == 2 * 16 * 128


def test_gradcheck() -> None:
    pack = Pack((3, 5), (4, 5), heads=2, width=3, columns=6)
    leaves = {name: value.requires_grad_() for name, value in pack.inputs().items()}
    assert torch.autograd.gradcheck(
        lambda *values: tuple(fused(dict(zip(leaves, values, strict=True)), pack).values()), tuple(leaves.values())
    )


def test_errors() -> None:
    inputs = {name: value.float() for name, value in Pack((4,), heads=3, kv_heads=3, columns=4).inputs().items()}

    def call(**changed: Tensor) -> None:
        args = {**inputs, **changed}
        lengths = boundaries((4,))
        router_attention(
            **args, cu_seqlens_q=lengths, cu_seqlens_kv=lengths, max_seqlen_q=4, max_seqlen_kv=4, scale=1.0
        )

    with pytest.raises(ValueError, match="multiple of key heads, got 3 and 2"):
        call(key=inputs["key"][:, :2], value=inputs["value"][:, :2])
    with pytest.raises(ValueError, match=r"shape \[positions, 2\], got \[4, 1\]"):
        call(columns=inputs["columns"][:, :1])
    with pytest.raises(ValueError, match="3 positions, the longest sample has 4 rows"):
        call(columns=inputs["columns"][:3])


def test_triton_refuses_wide_heads() -> None:
    query = torch.zeros(1, 1, 257, dtype=torch.bfloat16)
    assert "at most 256 columns, got 257" in (triton_impl.why_not(query) or "")
    assert "at most 128 columns, got 129" in (triton_impl.why_not(query.float()[..., :129]) or "")
