"""paged_layer against the layer's own sums in float64, on every back end."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parrot_kernels.paged_layer import cpu_impl
from parrot_kernels.testing import assert_all_accurate, poisoned_memory, worst_of
from parrot_sys.modules.rotary import rotary_cos_sin, rotate, turning
from parrot_sys.ops import force_backend
from parrot_sys.ops.paged_layer import LayerWeights, paged_layer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NEEDS_LOOPS = pytest.mark.skipif(bool(cpu_impl.why_not()), reason=str(cpu_impl.why_not()))
BACKENDS = ("reference", pytest.param("cpu", marks=NEEDS_LOOPS))
EPS, SCALE, BLOCK = 1e-6, 0.3, 4

Tensors = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """Requests (rows of the step, rows in the cache with these), and sizes."""

    requests: tuple[tuple[int, int], ...]
    groups: int = 1
    repeat: int = 2
    width: int = 6
    hidden: int = 20
    ffn: int = 9
    bias: bool = False
    normed: bool = False

    @property
    def rows(self) -> int:
        return sum(rows for rows, _ in self.requests)

    def floats(self) -> Tensors:
        heads = self.groups * self.repeat * self.width
        mixed = heads + 2 * self.groups * self.width
        blocks = sum(-(-length // BLOCK) for _, length in self.requests) + 1
        shapes: dict[str, tuple[int, ...]] = {
            "hidden": (self.rows, self.hidden),
            "norm_1": (self.hidden,),
            "w_qkv": (mixed, self.hidden),
            **({"b_qkv": (mixed,)} if self.bias else {}),
            **({"q_norm": (self.width,), "k_norm": (self.width,)} if self.normed else {}),
            "w_out": (self.hidden, heads),
            "norm_2": (self.hidden,),
            "w_gate_up": (2 * self.ffn, self.hidden),
            "w_down": (self.hidden, self.ffn),
            "key_cache": (blocks, self.groups, BLOCK, self.width),
            "value_cache": (blocks, self.groups, BLOCK, self.width),
        }
        scales = {"w_qkv": self.hidden, "w_out": heads, "w_gate_up": self.hidden, "w_down": self.ffn}
        return {
            name: torch.randn(shape, dtype=torch.float64) * scales.get(name, 1) ** -0.5
            for name, shape in shapes.items()
        }

    def places(self) -> Tensors:
        """Tables that go through the blocks in no order, and where the rows of the step are."""
        counts = [-(-length // BLOCK) for _, length in self.requests]
        order = torch.randperm(sum(counts) + 1)
        table = torch.full((len(counts), max(counts, default=0) + 1), 2**30, dtype=torch.int32)
        blocks, offsets, positions, used = [], [], [], 0
        for request, (count, (rows, length)) in enumerate(zip(counts, self.requests, strict=True)):
            table[request, :count] = order[used : used + count].int()
            for position in range(length - rows, length):
                blocks.append(int(order[used + position // BLOCK]))
                offsets.append(position % BLOCK)
                positions.append(position)
            used += count
        bounds = torch.tensor([0, *(rows for rows, _ in self.requests)]).cumsum(0).int()
        return {
            "blocks": torch.tensor(blocks, dtype=torch.int64),
            "offsets": torch.tensor(offsets, dtype=torch.int64),
            "positions": torch.tensor(positions, dtype=torch.int64),
            "block_tables": table,
            "cu_seqlens_q": bounds,
            "kv_lengths": torch.tensor([length for _, length in self.requests], dtype=torch.int32),
        }


@st.composite
def cases(draw: st.DrawFn) -> Case:
    requests = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 11)), min_size=1, max_size=4))
    return Case(
        requests=tuple((rows, rows + before) for rows, before in requests),
        groups=draw(st.integers(1, 2)),
        repeat=draw(st.integers(1, 3)),
        width=draw(st.sampled_from([6, 10, 16])),
        hidden=draw(st.sampled_from([20, 33])),
        ffn=draw(st.integers(1, 20)),
        bias=draw(st.booleans()),
        normed=draw(st.booleans()),
    )


def angles(positions: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return rotary_cos_sin(positions, width, base=100.0, dtype=dtype)


def plain(case: Case, floats: Tensors, places: Tensors) -> Tensors:
    """The layer, request by request, over copies of what the cache holds; in the dtype of the floats."""
    hidden, dtype = floats["hidden"], floats["hidden"].dtype
    mixed = F.linear(
        F.rms_norm(hidden, (case.hidden,), floats["norm_1"], EPS), floats["w_qkv"], floats.get("b_qkv")
    ).view(case.rows, case.groups, case.repeat + 2, case.width)
    query, key, value = mixed[:, :, :-2], mixed[:, :, -2:-1], mixed[:, :, -1]
    if case.normed:
        query = F.rms_norm(query, (case.width,), floats["q_norm"], EPS)
        key = F.rms_norm(key, (case.width,), floats["k_norm"], EPS)
    cos, sin = angles(places["positions"], case.width, dtype)
    query, key = (rotate(rows.flatten(1, 2), cos, sin).view(rows.shape) for rows in (query, key))
    keys, values = floats["key_cache"].clone(), floats["value_cache"].clone()
    keys[places["blocks"], :, places["offsets"]] = key.squeeze(2)
    values[places["blocks"], :, places["offsets"]] = value
    read = []
    bounds = places["cu_seqlens_q"].tolist()
    for request, (rows, length) in enumerate(case.requests):
        at = torch.arange(length)
        blocks = places["block_tables"][request].long()[at // BLOCK]
        own_keys, own_values = (cache[blocks, :, at % BLOCK].transpose(0, 1) for cache in (keys, values))
        own = query[bounds[request] : bounds[request + 1]].permute(1, 2, 0, 3)  # [g, r, L, d]
        scores = own @ own_keys[:, None].transpose(-1, -2) * SCALE
        seen = at <= torch.arange(length - rows, length)[:, None]
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        read.append((weights @ own_values[:, None]).permute(2, 0, 1, 3).flatten(1))
    attended = hidden + F.linear(torch.cat(read), floats["w_out"])
    gates = F.linear(F.rms_norm(attended, (case.hidden,), floats["norm_2"], EPS), floats["w_gate_up"])
    gate, up = gates.chunk(2, dim=-1)
    out = attended + F.linear(F.silu(gate) * up, floats["w_down"])
    return {"out": out, "key_cache": keys, "value_cache": values}


def in_reverse(case: Case, floats: Tensors, places: Tensors) -> Tensors:
    """The same with the hidden columns and those of gate and up from their ends."""
    dims = {"hidden": (1,), "norm_1": (0,), "norm_2": (0,), "w_qkv": (1,), "w_out": (0,), "w_down": (0, 1)}
    turned = {name: tensor.flip(dims.get(name, ())) for name, tensor in floats.items()}
    turned["w_gate_up"] = turned["w_gate_up"].unflatten(0, (2, -1)).flip(1, 2).flatten(0, 1)
    found = plain(case, turned, places)
    return {**found, "out": found["out"].flip(1)}


def run(case: Case, floats: Tensors, places: Tensors) -> Tensors:
    caches = floats["key_cache"].clone(), floats["value_cache"].clone()
    weights = LayerWeights(**{name: floats.get(name) for name in LayerWeights._fields})
    turns = turning(*angles(places["positions"], case.width, floats["hidden"].dtype))
    requests = places["block_tables"], places["cu_seqlens_q"], places["kv_lengths"]
    where = places["blocks"], places["offsets"]
    out = paged_layer(floats["hidden"], weights, turns, caches, where, requests, eps=EPS, scale=SCALE)
    return {"out": out, "key_cache": caches[0], "value_cache": caches[1]}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None, derandomize=True)  # (a search would look for the worst rounding of a chain)
@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_values_and_what_is_written(backend: str, dtype: str, case: Case, seed: int) -> None:
    torch.manual_seed(seed)
    floats = {name: tensor.to(DTYPES[dtype]) for name, tensor in case.floats().items()}
    places = case.places()
    with force_backend(backend), poisoned_memory():
        actual = run(case, floats, places)
    exact = plain(case, {name: tensor.double() for name, tensor in floats.items()}, places)
    assert actual["out"].dtype == DTYPES[dtype]
    orders = plain(case, floats, places), in_reverse(case, floats, places)
    assert_all_accurate(actual, exact, worst_of(exact, *orders))


@NEEDS_LOOPS
@settings(max_examples=20, deadline=None)
@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_a_request_does_not_depend_on_the_others(case: Case, seed: int) -> None:
    torch.manual_seed(seed)
    floats, places = {name: tensor.float() for name, tensor in case.floats().items()}, case.places()
    with force_backend("cpu"):
        together = run(case, floats, places)["out"]
        bounds = places["cu_seqlens_q"].tolist()
        for request, own in enumerate(case.requests):
            rows = slice(bounds[request], bounds[request + 1])
            alone = {name: places[name][rows] for name in ("blocks", "offsets", "positions")}
            alone |= {name: places[name][request : request + 1] for name in ("block_tables", "kv_lengths")}
            alone["cu_seqlens_q"] = torch.tensor([0, own[0]], dtype=torch.int32)
            one = dataclasses.replace(case, requests=(own,))
            assert torch.equal(run(one, {**floats, "hidden": floats["hidden"][rows]}, alone)["out"], together[rows])


@NEEDS_LOOPS
def test_what_does_not_fit_is_named() -> None:
    case = Case(((1, 5), (2, 2)), normed=True)
    floats, places = {name: tensor.float() for name, tensor in case.floats().items()}, case.places()
    wrong: list[tuple[Tensors, Tensors, str]] = [
        ({"w_out": floats["w_out"][:, :-1].contiguous()}, {}, "w_out must have columns"),
        ({"k_norm": torch.ones(5)}, {}, "norm must have shape"),
        ({"norm_1": torch.ones(3)}, {}, "norm must have shape"),
        ({"value_cache": floats["value_cache"][:-1]}, {}, "values must have shape"),
        ({}, {"blocks": torch.tensor([0, 1, len(floats["key_cache"])])}, "row 2 must be in a cache"),
        ({}, {"offsets": torch.tensor([0, -1, 0])}, "row 1 must be in a cache"),
    ]
    for changed, moved, message in wrong:
        with force_backend("cpu"), pytest.raises(RuntimeError, match=message):
            run(case, floats | changed, places | moved)
