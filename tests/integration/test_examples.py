"""The programs of examples/, as their readers start them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch._dynamo  # noqa: F401 # every optimizer imports it: once here instead of a second in each forked rank

from parrot_sys.testing.distributed import run_distributed

ROOT = Path(__file__).parents[2]


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(rank: int, size: int, example: ModuleType, argv: list[str]) -> int:
    example.shutdown = lambda: None  # the groups are those of the test
    return example.main(argv)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_gpt_moe_with_torchrun() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "examples" / "gpt_moe.py"), "--expert-parallel", "2", "--dispatcher", "alltoall"]
    done = subprocess.run(
        [*command, "--steps", "2"], env=_environment(), capture_output=True, text=True, timeout=240, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "equal up to rounding" in done.stdout
    assert len(re.findall(r"^ +[01]  +\d\.\d{7}  +\d\.\d{7}  +\d\.\de[+-]\d\d$", done.stdout, re.MULTILINE)) == 2


@pytest.mark.parametrize(
    ("size", "argv"), [(1, []), (4, ["--tensor-parallel", "2", "--expert-parallel", "2", "--dispatcher", "alltoall"])]
)
def test_gpt_moe_on_other_layouts(size: int, argv: list[str]) -> None:
    settings = ["--steps", "2", "--layers", "1", "--experts", "4"]
    assert run_distributed(_run, size, _load("gpt_moe"), [*argv, *settings], timeout=120) == [0] * size


@pytest.mark.parametrize("nan_in", ["peer", "ours", "both"])
def test_gpt_moe_does_not_call_losses_equal_that_are_no_numbers(nan_in: str) -> None:
    compare, losses, nan = _load("gpt_moe").compare, [2.0, 1.0, 0.5], [2.0, float("nan"), 0.5]
    assert compare(losses, list(losses))
    assert not compare(losses if nan_in == "ours" else nan, losses if nan_in == "peer" else nan)


@pytest.mark.parametrize(("size", "argv"), [(1, ["--topk", "2"]), (2, ["--tensor-parallel", "2"])])
def test_llava_text_guided(size: int, argv: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    example = _load("llava_text_guided")
    assert run_distributed(_run, size, example, [*argv, "--steps", "6"], timeout=120) == [0] * size
    table = capfd.readouterr().out
    losses = [line.split()[1:3] for line in table.splitlines() if re.match(r" +\d+  +\d", line)]
    for column in zip(*losses, strict=True):
        assert float(column[-1]) < float(column[0])
    assert table.count("  language ") == example.LANGUAGES


@pytest.mark.parametrize("name", ["gpt_moe", "llava_text_guided"])
def test_help_teaches(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        _load(name).parse(["--help"])
    text = capsys.readouterr().out
    assert "torchrun --nproc-per-node 4" in text
    with pytest.raises(SystemExit, match="2"):
        _load(name).parse(["--topk", "99"])
    assert "--topk must be in [1, --experts=" in capsys.readouterr().err
