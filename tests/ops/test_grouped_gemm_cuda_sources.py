"""The CUDA grouped products: on a GPU if there is one, else their sources compiled for the CPU (tests/cuda_emulator).

Values and gradients against a loop over the groups in float64. Tiles are 128 rows by 256 columns (SwiGLU: 128 units),
or 192 where reductions are short; 64 steps of the reduction are a stage, four stages a ring.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parrot_kernels.grouped_gemm import cuda_impl
from parrot_kernels.testing import assert_all_accurate, outputs_and_gradients
from parrot_sys.ops import k_grouped_gemm, m_grouped_gemm, m_grouped_swiglu
from tests import cuda_emulator


@dataclass(frozen=True)
class Ragged:
    """Segments in each group, segments past the last group, rows of a segment, widths."""

    counts: tuple[int, ...]
    padding: int = 0
    rows: int = 1
    k: int = 72
    n: int = 40
    planned: bool = False

    @property
    def segments(self) -> int:
        return sum(self.counts) + self.padding

    @property
    def offsets(self) -> Tensor:
        return torch.tensor([0, *self.counts]).cumsum(0).int()


CASES = {
    "tokens": Ragged((130, 0, 3), padding=5, n=264),  # two tiles each way, an empty group, rows and columns left over
    "ring": Ragged((70,), k=8 * 64 + 8, n=8),  # more stages than the ring has
    "images": Ragged((1, 0, 2), rows=70, padding=1),  # a tile that begins within an image
    "gathered": Ragged((2, 0, 1), rows=70, padding=1, planned=True),  # images that are read twice
    # Segments of fewer than 64 rows, gathered row by row: two tiles each way, and more stages than the ring has.
    "gathered_tokens": Ragged((130, 0, 3), padding=5, n=264, planned=True),
    "gathered_rows": Ragged((9, 0, 30), rows=5, padding=2, k=264, n=8, planned=True),
    "gathered_ring": Ragged((70, 3), k=8 * 64 + 8, n=8, planned=True),
    "band": Ragged((17,) * 3, rows=128, k=8, n=8),  # more row blocks than a band
    # Tiles of 256 columns, which both warp groups share: forward and gradient of x; gradient of the weights.
    "wide": Ragged((130, 3), padding=2, k=256, n=256),
    "wide_sum": Ragged((130,), k=256, n=136),
    "least": Ragged((1,), k=8, n=8),
    "only_padding": Ragged((0, 0), padding=3, n=8),
    "no_row": Ragged((0, 0), n=8),
}
RUNS = [(case, torch.bfloat16) for case in CASES] + [(case, torch.float16) for case in ("tokens", "gathered_tokens")]
RUN_IDS = [f"{case}-{str(dtype).removeprefix('torch.')}" for case, dtype in RUNS]


def make_plan(ragged: Ragged) -> tuple[Tensor | None, int, int]:
    """A plan, its divisor, and the number of segments that it reads."""
    if not ragged.planned:
        return None, 1, ragged.segments
    sources = ragged.segments // 2 + 1
    return torch.randperm(2 * sources)[: ragged.segments], 2, sources


def by_group(ragged: Ragged, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The rows of each group, padding left out."""
    return list(zip(*(t[: sum(ragged.counts)].split(ragged.counts) for t in tensors), strict=True))


def padded(ragged: Ragged, groups: list[Tensor]) -> Tensor:
    y = torch.cat(groups)
    return torch.cat((y, y.new_zeros(ragged.padding, *y.shape[1:])))


def check(op, plain, inputs: dict[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
    """`op` on `device` in `dtype` against `plain` in float64."""
    inputs = {name: value.to(dtype).double() for name, value in inputs.items()}

    def on_device(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": op({name: leaf.to(device) for name, leaf in leaves.items()}).cpu()}

    actual = outputs_and_gradients(on_device, inputs, dtype)
    assert actual["y"].dtype == dtype
    exact, same = (
        outputs_and_gradients(lambda leaves: {"y": plain(leaves)}, inputs, d) for d in (torch.float64, dtype)
    )
    assert_all_accurate(actual, exact, same)


@pytest.mark.parametrize("trans_w", [True, False], ids=["nt", "nn"])
@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=RUN_IDS)
def test_m_grouped_gemm(ran_on, cuda_device, case: str, dtype: torch.dtype, trans_w: bool) -> None:
    ragged = CASES[case]
    plan, topk, sources = make_plan(ragged)
    shape = (ragged.n, ragged.k) if trans_w else (ragged.k, ragged.n)
    inputs = {"x": torch.randn(sources, ragged.rows, ragged.k), "w": torch.randn(len(ragged.counts), *shape)}
    on_device = (None if plan is None else plan.to(cuda_device)), ragged.offsets.to(cuda_device)

    def op(leaves: dict[str, Tensor]) -> Tensor:
        return m_grouped_gemm(leaves["x"], leaves["w"], on_device[1], plan=on_device[0], topk=topk, trans_w=trans_w)

    def plain(leaves: dict[str, Tensor]) -> Tensor:
        x = leaves["x"] if plan is None else leaves["x"][plan // topk]
        groups = zip(by_group(ragged, x), leaves["w"].mT if trans_w else leaves["w"], strict=True)
        return padded(ragged, [rows @ w for (rows,), w in groups])

    with ran_on("cuda", "grouped_gemm", "m_grouped_gemm", "m_grouped_gemm_bwd"):
        check(op, plain, inputs, dtype, cuda_device)


@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("case", ["images", "gathered", "gathered_tokens", "gathered_rows", "units", "no_row"])
def test_m_grouped_swiglu(ran_on, cuda_device, case: str, recompute: bool) -> None:
    ragged = Ragged((3, 2), padding=1, k=8, n=136) if case == "units" else CASES[case]  # two tiles, each half up
    plan, topk, sources = make_plan(ragged)
    inputs = {
        "x": torch.randn(sources, ragged.rows, ragged.k),
        "w": torch.randn(len(ragged.counts), 2, ragged.n, ragged.k) * ragged.k**-0.5,
    }
    weights = None if case == "units" else torch.rand(ragged.segments)
    on_device = [None if t is None else t.to(cuda_device) for t in (ragged.offsets, plan, weights)]

    def op(leaves: dict[str, Tensor]) -> Tensor:
        offsets, own_plan, own_weights = on_device
        routed = {"weights": own_weights, "plan": own_plan, "topk": topk, "recompute": recompute}
        return m_grouped_swiglu(leaves["x"], leaves["w"], offsets, **routed)

    def plain(leaves: dict[str, Tensor]) -> Tensor:
        x = leaves["x"] if plan is None else leaves["x"][plan // topk]
        factors = (torch.ones(ragged.segments) if weights is None else weights)[:, None, None].to(x.dtype)
        groups = zip(by_group(ragged, x, factors), leaves["w"], strict=True)
        return padded(ragged, [F.silu(r @ w[0].T) * (r @ w[1].T) * f for (r, f), w in groups])

    with ran_on("cuda", "grouped_gemm", "m_grouped_swiglu", "m_grouped_swiglu_bwd"):
        check(op, plain, inputs, torch.bfloat16, cuda_device)


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=RUN_IDS)
def test_k_grouped_gemm(ran_on, cuda_device, case: str, dtype: torch.dtype) -> None:
    ragged = CASES[case]
    plan, topk, sources = make_plan(ragged)
    inputs = {
        "a": torch.randn(ragged.segments, ragged.rows, ragged.n),
        "b": torch.randn(sources, ragged.rows, ragged.k),
    }

    def plain(leaves: dict[str, Tensor]) -> Tensor:
        b = leaves["b"] if plan is None else leaves["b"][plan // topk]
        return torch.stack([a.flatten(0, 1).T @ b.flatten(0, 1) for a, b in by_group(ragged, leaves["a"], b)])

    def op(leaves: dict[str, Tensor]) -> Tensor:
        own_plan = None if plan is None else plan.to(cuda_device)
        return k_grouped_gemm(leaves["a"], leaves["b"], ragged.offsets.to(cuda_device), plan=own_plan, topk=topk)

    with ran_on("cuda", "grouped_gemm", "k_grouped_gemm"), torch.no_grad():
        values = {name: value.to(dtype) for name, value in inputs.items()}
        actual = op({name: value.to(cuda_device) for name, value in values.items()}).cpu()
    exact = plain({name: value.double() for name, value in values.items()})
    assert_all_accurate({"c": actual}, {"c": exact}, {"c": plain(values)})


def run_all(device: torch.device, case: str) -> list[Tensor]:
    """One call of each launcher, with NaN in the padding."""
    torch.manual_seed(0)
    ragged = CASES[case]
    plan, topk, sources = make_plan(ragged)
    x = torch.randn(sources, ragged.rows, ragged.k)
    a = torch.randn(ragged.segments, ragged.rows, ragged.n)
    w = torch.randn(len(ragged.counts), 2, ragged.n, ragged.k)
    if ragged.padding:
        a[-ragged.padding :] = float("nan")
        if plan is None:
            x[-ragged.padding :] = float("nan")
    x, a, w = (t.to(device, torch.bfloat16) for t in (x, a, w))
    route = ragged.offsets.to(device), (None if plan is None else plan.to(device)), topk
    y = cuda_impl.m_grouped_gemm(x, w[:, 0].contiguous(), *route, True)
    h, z = cuda_impl.m_grouped_swiglu(x, w, *route, None, True)
    return [y.cpu(), h.cpu(), z.cpu(), cuda_impl.k_grouped_gemm(a, x, *route).cpu()]


@pytest.mark.parametrize("case", ["tokens", "gathered", "gathered_tokens", "gathered_ring"])
def test_neither_order_of_threads_nor_number_of_blocks_changes_a_bit(cuda_device, case: str) -> None:
    """On a GPU two runs must agree; the emulator also shuffles its threads and delays copies. Padding goes nowhere."""
    results = []
    for seed, multiprocessors in ((0, 1), (1, 3)):
        with cuda_emulator.device(seed=seed, multiprocessors=multiprocessors):
            results.append(run_all(cuda_device, case))
    for first, second in zip(*results, strict=True):
        assert first.isfinite().all()
        assert torch.equal(first, second)


def test_reasons_for_a_refusal(cuda_device: torch.device) -> None:
    def reason(k: int = 16, n: int = 8, rows: int = 1, planned: bool = False) -> str | None:
        x, w = (torch.empty(*s, dtype=torch.bfloat16, device=cuda_device) for s in ((2, rows, k), (1, n, k)))
        return cuda_impl.why_not(x, w, None, torch.zeros(3, dtype=torch.int64) if planned else None, 1, True)

    assert reason() is None
    assert reason(rows=1, planned=True) is None
    assert reason(k=12) == "each width must be a multiple of 8 for bfloat16, got 12"
    assert reason(n=12) == "each width must be a multiple of 8 for bfloat16, got 12"


def test_host_checks_name_what_is_wrong(cuda_device: torch.device) -> None:
    x, w = (torch.zeros(s, dtype=torch.bfloat16, device=cuda_device) for s in ((2, 3, 16), (1, 8, 16)))
    offsets = torch.tensor([0, 2], device=cuda_device)
    ops = torch.ops.parrot_ext
    with pytest.raises(RuntimeError, match=r"w must have shape \[1, any, 16\], got \[1, 16, 8\]"):
        ops.m_grouped_gemm_cuda(x, w.mT, offsets, None, 1, True)
    with pytest.raises(RuntimeError, match="w must be contiguous"):
        ops.m_grouped_gemm_cuda(x, w.mT, offsets, None, 1, False)
    with pytest.raises(RuntimeError, match="x must be bfloat16 or float16, got Float"):
        ops.m_grouped_gemm_cuda(x.float(), w.float(), offsets, None, 1, True)
    with pytest.raises(RuntimeError, match=r"plan must have dtype Long, got Int"):
        ops.m_grouped_gemm_cuda(x, w, offsets, torch.zeros(2, dtype=torch.int32, device=cuda_device), 1, True)
    with pytest.raises(RuntimeError, match="K must be a positive multiple of 8, got 12"):
        ops.k_grouped_gemm_cuda(x, x[:, :, :12].contiguous(), offsets, None, 1)
    with pytest.raises(RuntimeError, match=r"w_gate_up must have shape \[1, 2, any, 16\], got \[1, 8, 16\]"):
        ops.m_grouped_swiglu_cuda(x, w, offsets, None, 1, None, True)
