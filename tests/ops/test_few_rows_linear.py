"""few_rows_linear against the same sums in float64, on every back end."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parrot_kernels.few_rows_linear import cpu_impl
from parrot_kernels.testing import assert_accurate, poisoned_memory
from parrot_sys.ops import few_rows_linear, force_backend
from parrot_sys.ops.few_rows_linear import takes_few_rows

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BACKENDS = (
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(bool(cpu_impl.why_not()), reason=str(cpu_impl.why_not()))),
)
EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes, and what comes before and after the product."""

    rows: int
    inputs: int
    outputs: int
    norm: bool = False
    bias: bool = False
    residual: bool = False
    gated: bool = False

    def tensors(self) -> dict[str, Tensor]:
        shapes = {"x": (self.rows, self.inputs * (1 + self.gated)), "weight": (self.outputs, self.inputs)}
        shapes |= {"norm": (self.inputs,)} if self.norm else {}
        shapes |= {"bias": (self.outputs,)} if self.bias else {}
        shapes |= {"residual": (self.rows, self.outputs)} if self.residual else {}
        return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Rows over and below the tiles (4, and rests of 1 to 3), inputs over and below 8 lanes, outputs around 12 and 192,
    where a task ends."""
    before = draw(st.sampled_from(["nothing", "norm", "gates"]))
    return Case(
        rows=draw(st.integers(0, 9)),
        inputs=draw(st.integers(1, 40)),
        outputs=draw(st.one_of(st.integers(1, 30), st.integers(185, 200))),
        norm=before == "norm",
        gated=before == "gates",
        bias=draw(st.booleans()),
        residual=draw(st.booleans()),
    )


def plain(tensors: dict[str, Tensor], case: Case) -> Tensor:
    """The layers one after the other."""
    x = tensors["x"]
    if case.gated:
        gate, up = x.chunk(2, dim=-1)
        x = F.silu(gate) * up
    if case.norm:
        x = F.rms_norm(x, (case.inputs,), tensors["norm"], EPS)
    out = F.linear(x, tensors["weight"], tensors.get("bias"))
    return out + tensors["residual"] if case.residual else out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None)
@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_values(backend: str, dtype: str, case: Case, seed: int) -> None:
    torch.manual_seed(seed)
    own = {name: tensor.to(DTYPES[dtype]) for name, tensor in case.tensors().items()}
    exact = plain({name: tensor.double() for name, tensor in own.items()}, case)
    with force_backend(backend), poisoned_memory():
        out = few_rows_linear(**own, gated=case.gated, eps=EPS)
    assert out.dtype == DTYPES[dtype]
    assert_accurate("out", out, exact, plain(own, case))


@pytest.mark.skipif(bool(cpu_impl.why_not()), reason=str(cpu_impl.why_not()))
@settings(max_examples=20, deadline=None)
@given(case=cases().filter(lambda case: case.rows > 0), seed=st.integers(0, 2**32 - 1))
def test_a_row_does_not_depend_on_the_others(case: Case, seed: int) -> None:
    torch.manual_seed(seed)
    own = {name: tensor.float() for name, tensor in case.tensors().items()}
    row = random.Random(seed).randrange(case.rows)
    alone = {name: tensor[row : row + 1] if name in ("x", "residual") else tensor for name, tensor in own.items()}
    with force_backend("cpu"):
        together = few_rows_linear(**own, gated=case.gated, eps=EPS)
        assert torch.equal(few_rows_linear(**alone, gated=case.gated, eps=EPS)[0], together[row])


@pytest.mark.skipif(bool(cpu_impl.why_not()), reason=str(cpu_impl.why_not()))
@pytest.mark.parametrize("name", ["norm", "bias", "residual"])
def test_wrong_tensors_are_named(name: str) -> None:
    tensors = {key: own.float() for key, own in Case(2, 8, 5, norm=True, bias=True, residual=True).tensors().items()}
    with force_backend("cpu"), pytest.raises(RuntimeError, match=f"{name} must have shape"):
        few_rows_linear(**tensors | {name: tensors[name][..., :-1]})


def test_shapes_and_options_that_do_not_fit() -> None:
    x, weight = torch.zeros(2, 8), torch.zeros(5, 8)
    with pytest.raises(ValueError, match=r"\[rows, 2 inputs\]"):
        few_rows_linear(x, weight, gated=True)
    with pytest.raises(ValueError, match="do not go together"):
        few_rows_linear(torch.zeros(2, 16), weight, gated=True, norm=torch.ones(8))


@pytest.mark.skipif(bool(cpu_impl.why_not()), reason=str(cpu_impl.why_not()))
def test_layers_use_it_only_where_the_loops_run() -> None:
    assert takes_few_rows(torch.zeros(32, 8))
    others = torch.zeros(33, 8), torch.zeros(2, 8).double(), torch.zeros(2, 8, device="meta")
    assert not any(takes_few_rows(other) for other in others)
    with force_backend("reference"):
        assert not takes_few_rows(torch.zeros(2, 8))
