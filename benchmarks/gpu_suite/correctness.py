"""Stage `correctness`: every back end of every op against its formula in float64, gradients included.

Each row also checks that a second run gives the same bits, and on a GPU that a CUDA graph of both passes does.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_suite.problems import Case, Problem
from benchmarks.gpu_suite.problems_attention import CASES as ATTENTION
from benchmarks.gpu_suite.problems_moe import CASES as MOE
from benchmarks.workload import Unavailable
from parrot_kernels.testing import assert_all_accurate, max_error, outputs_and_gradients, poisoned_memory
from parrot_sys.ops import force_backend

CASES = {f"{case.op}/{case.name}": case for case in (*MOE, *ATTENTION)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
WORKERS = 6
ROW_SECONDS = 150


def backends(device: str) -> tuple[str, ...]:
    """The compiled ones of the device; Triton's interpreter takes CPU tensors where TRITON_INTERPRET is set."""
    return ("triton", "cuda") if device == "cuda" else ("cpu", "triton", "reference")


def rows(device: str) -> list[str]:
    """`op/case/backend/dtype`, one dtype after the other; on a CPU only what is small."""
    names = [name for name, case in CASES.items() if device == "cuda" or not case.large]
    return [
        f"{name}/{backend}/{dtype}"
        for dtype in DTYPES
        for name in names
        if dtype in CASES[name].dtypes
        for backend in backends(device)
    ]


def run_row(row: str, device: str, *, thorough: bool = True) -> dict[str, Any]:
    """Errors of one row relative to the largest value, by output and gradient.

    Args:
        row: one of `rows`.
        device: "cuda" or "cpu".
        thorough: run twice, and as a CUDA graph.

    Raises:
        AssertionError: the results are not accurate, or not the same twice.
        Unavailable: the back end does not take these arguments.
    """
    name, backend, dtype_name = row.rsplit("/", 2)
    case, dtype = CASES[name], DTYPES[dtype_name]
    torch.manual_seed(0)
    problem = case.make(torch.device(device))
    inputs = {key: value.to(dtype).double() for key, value in problem.inputs.items()}
    exact = outputs_and_gradients(problem.plain, inputs, torch.float64, gradients=problem.gradients)
    same_dtype = outputs_and_gradients(problem.plain, inputs, dtype, gradients=problem.gradients)
    own = _results(problem, inputs, dtype, backend)
    assert_all_accurate(own, exact, same_dtype)
    with force_backend(backend):
        for key, (value, wanted) in problem.exact().items():
            assert torch.equal(value, wanted), f"{key} differs"
        # (An empty graph cannot be captured.)
        if thorough and device == "cuda" and any(value.numel() for value in own.values()):
            _assert_graph(problem, inputs, dtype)
    if thorough:
        _assert_same("a second run", own, _results(problem, inputs, dtype, backend))
    return {"errors": {key: _relative(value, exact[key]) for key, value in own.items()}}


def _results(problem: Problem, inputs: dict[str, Tensor], dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    with force_backend(backend), poisoned_memory(), warnings.catch_warnings():
        # Poisoning turns deterministic algorithms on, and PyTorch names every operator that has none.
        warnings.filterwarnings("ignore", message=".*deterministic.*")
        try:
            return outputs_and_gradients(problem.op, inputs, dtype, gradients=problem.gradients)
        except NotImplementedError as error:  # a back end's refusal (ops/registry.py): reported, with its reason
            raise Unavailable(str(error)) from error


def _assert_same(what: str, own: dict[str, Tensor], again: dict[str, Tensor]) -> None:
    for key, value in own.items():
        assert torch.equal(value, again[key]), (
            f"{what} gives another {key}, by {max_error(again[key], value.double()):.3e}"
        )


def _assert_graph(problem: Problem, inputs: dict[str, Tensor], dtype: torch.dtype) -> None:
    """A captured forward and backward pass, replayed on other inputs, gives what a direct call gives."""
    leaves = {key: value.to(dtype).requires_grad_(problem.gradients) for key, value in inputs.items()}
    forward_and_backward(problem, leaves)  # compiles and tunes, which a capture could not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_and_backward(problem, leaves)
    with torch.no_grad():
        for value in leaves.values():
            value.mul_(0.5)
    graph.replay()
    _assert_same("a CUDA graph", forward_and_backward(problem, leaves), captured)


def forward_and_backward(problem: Problem, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients of `leaves`, without a look at any value on the host."""
    outputs = problem.op(leaves)
    if not problem.gradients:
        return outputs
    grads = torch.autograd.grad(
        list(outputs.values()), list(leaves.values()), list(map(torch.ones_like, outputs.values()))
    )
    return outputs | {f"grad_{key}": grad for key, grad in zip(leaves, grads, strict=True)}


def _relative(value: Tensor, exact: Tensor) -> float:
    finite = exact[exact.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return max_error(value, exact) / scale if scale else max_error(value, exact)


def small_rows(op: str, backend: str) -> list[str]:
    """What the sanitizer runs."""
    return [f"{name}/{backend}/bf16" for name, case in CASES.items() if case.op == op and not case.large]


def op_names() -> list[str]:
    """Ops that have cases."""
    found: dict[str, Case] = {case.op: case for case in CASES.values()}
    return list(found)
