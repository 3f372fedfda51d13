"""Every Triton kernel compiles for the GPUs it claims, without spills, to the recorded figures."""

from __future__ import annotations

import importlib.util
import os
import pkgutil
import subprocess
import sys

import pytest

import parrot_kernels
from parrot_kernels import compile_only
from parrot_kernels.compile_only import Case

OPS = [module.name for module in pkgutil.iter_modules(parrot_kernels.__path__) if module.ispkg]
ROW = {"registers": 64, "shared": 1024, "HGMMA": 4}


def has_module(op: str, name: str) -> bool:
    return importlib.util.find_spec(f"parrot_kernels.{op}.{name}") is not None


def run_compiler(*args: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: in this one the kernels are made for the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "parrot_kernels.compile_only", *args]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arch", compile_only.ARCHS)
def test_changed_kernels_compile_as_recorded(arch: int) -> None:
    result = run_compiler("--arch", str(arch), "--which", "changed")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("arch", compile_only.ARCHS)
def test_all_kernels_compile_as_recorded(arch: int) -> None:
    result = run_compiler("--arch", str(arch), "--which", "all")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("op", [op for op in OPS if has_module(op, "triton_impl")])
def test_every_triton_op_has_cases_and_figures(op: str) -> None:
    assert op in compile_only.op_names(), f"parrot_kernels/{op}/compile_cases.py is missing"
    assert compile_only.read_figures()["sm_90"].get(op), f"run python -m parrot_kernels.compile_only --op {op} --update"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ROW, "STL": 3}, "spills"),
        ({**ROW, "shared": 232449}, "232449 bytes of shared memory, sm_90 has 232448"),
        ({"registers": 64, "shared": 1024}, "has no HGMMA"),
        ({**ROW, "registers": 65}, "is recorded as"),
        ({**ROW, "narrow_strides": 1}, "multiplies the stride of a TMA descriptor in 32 bits"),
    ],
)
def test_what_is_wrong_is_found(row: compile_only.Figures, message: str) -> None:
    case = Case(name="case", run=lambda: None, instructions={"_kernel": ("HGMMA",)})
    name = "_kernel[warps=4, stages=3]"
    assert compile_only.problems_of(case, {name: ROW}, {name: ROW}, 90) == []
    assert any(message in problem for problem in compile_only.problems_of(case, {name: row}, {name: ROW}, 90))


@pytest.mark.parametrize(("buffers", "right"), [(2, False), (3, True)])
def test_stages_that_wait_for_an_address_are_found(buffers: int, right: bool) -> None:
    """A copy by TMA whose place is loaded in the same step keeps fewer copies of a tile than it has stages."""
    name, row = "_kernel[BLOCK_T=64, warps=4, stages=3]", {**ROW, "UTMALDG": 1, "buffers": buffers}
    case = Case(name="case", run=lambda: None, instructions={"_kernel BLOCK_T=64": ("UTMALDG",)})
    problems = compile_only.problems_of(case, {name: row}, {name: row}, 90)
    assert problems == ([] if right else [f"{name} keeps 2 copies of a tile, not one for each stage"])
    other = Case(name="case", run=lambda: None, instructions={"_kernel BLOCK_T=16": ("UTMALDG",)})
    assert compile_only.problems_of(other, {name: row}, {name: row}, 90) == [
        "claims _kernel BLOCK_T=16, which it does not compile"
    ]


def test_case_without_kernels_is_found() -> None:
    case = Case(name="case", run=lambda: None, instructions={"_kernel": ("HGMMA",)})
    problems = compile_only.problems_of(case, {}, {"_other[warps=4]": ROW}, 90)
    assert [problem.split(",")[0] for problem in problems] == [
        "compiles nothing that no earlier case of the op compiles",
        "_other[warps=4] is recorded and no longer compiled; run --update",
        "claims _kernel",
    ]


def test_the_interpreter_cannot_compile() -> None:
    command = [sys.executable, "-m", "parrot_kernels.compile_only"]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 2
    assert "TRITON_INTERPRET is set" in result.stderr
