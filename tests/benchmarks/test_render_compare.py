"""Tables, plots and comparison of results files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare
from benchmarks.gpu_suite.__main__ import main
from benchmarks.gpu_suite.analysis import ceilings, timings, verdicts

Content = dict[str, Any]


def _row(ms: float, *, ours: bool, wanted: dict[str, float] | None = None, checked: bool = True) -> Content:
    times = {"ms": ms, "p10_ms": 0.9 * ms, "p90_ms": 1.1 * ms, "flops": 79e9, "bytes": 43e6}
    return {
        "status": "passed",
        "ours": ours,
        "difference": {"output_0": 1e-3} if checked else {},
        "wanted": {"fwd": wanted or {}},
        "passes": {"fwd": {**times, "tflops": 79 / ms, "gbytes_s": 43 / ms}},
    }


@pytest.fixture
def content() -> Content:
    """As the stages write it, for an H200: a product whose floor is 0.1 ms."""
    wanted = {"triton: best": 0.9, "cuda: best": 1.0, "tflops": 620, "x loop": 2.0, "x absent": 1.0, "ms": 0.11}
    bench = {
        "gemm/a/triton": _row(0.125, ours=True, wanted=wanted),
        "gemm/a/cuda": _row(0.120, ours=True, wanted=wanted),
        "gemm/a/loop": _row(0.240, ours=False),
        "gemm/a/fast": _row(0.1175, ours=False),
        "gemm/a/bound": _row(0.105, ours=False, checked=False),
        "gemm/a/peer": {"status": "unavailable", "error": "peer does not import"},
    }
    correct = {
        "swiglu/tokens/triton/bf16": {"status": "passed", "errors": {"h": 0.004}},
        "swiglu/none/triton/bf16": {"status": "failed", "error": "AssertionError: h | wrong"},
        "swiglu/none/triton/fp16": {"status": "not_run", "error": "the budget of 450 s had ended"},
    }
    memory = {"memcheck/swiglu/triton": {"status": "passed", "cases": 4, "summary": "ERROR SUMMARY: 0"}}
    kernels = [{"kernel": "_kernel", "figures": {"Duration [ns]": 1234.0, "DRAM Throughput [%]": 88.0}}]
    stages = {
        "correctness": correct,
        "sanitize": memory,
        "bench": bench,
        "profile": {"swiglu/a/triton/fwd": {"status": "passed", "kernels": kernels}},
    }
    return {
        "schema": 1,
        "machine": {"device": "NVIDIA H200", "torch": "2.11", "commit": "abc", "packages": {"liger-kernel": None}},
        "stages": {name: {"runs": [{"seconds": 10.0}], "rows": rows} for name, rows in stages.items()},
    }


def test_targets_are_judged_against_checked_peers(content: Content) -> None:
    measured = timings(content)
    by_name = {timing.contender: verdicts(timing, measured) for timing in measured}
    assert by_name["triton"] == {
        ">= 0.90 x best peer": True,  # 0.1175 / 0.125 = 0.94; the bound's 0.105 does not count
        "tflops >= 620": True,
        ">= 2.00 x loop": False,
        ">= 1.00 x absent": None,
        "<= 0.11 ms": False,
    }
    assert by_name["cuda"][">= 1.00 x best peer"] is False
    assert by_name["cuda"][">= 2.00 x loop"] is True
    assert by_name["fast"] == {}


def test_floor_is_that_of_the_reference_machine(content: Content) -> None:
    (timing,) = (timing for timing in timings(content) if timing.contender == "triton")
    assert timing.floor_ms == pytest.approx(0.1)
    assert timing.share == pytest.approx(0.8)


def test_elsewhere_ceilings_are_measured(content: Content) -> None:
    content["machine"]["device"] = "another GPU"
    assert ceilings(content) is None
    rows = content["stages"]["bench"]["rows"]
    rows["ceiling/matmul/torch"] = _row(1.0, ours=True)
    rows["ceiling/copy/torch"] = _row(0.5, ours=True)
    found = ceilings(content)
    assert found is not None
    assert (found.flops, found.bytes) == pytest.approx((79e12, 86e9))
    assert found.source == "this run"


def test_render_writes_every_stage(tmp_path: Path, content: Content, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "h200.json"
    path.write_text(json.dumps(content))
    assert main(["render", str(path), "--out", str(tmp_path / "out")]) == 0
    written = capsys.readouterr().out.split()
    assert [Path(name).name for name in written] == ["h200.md", "h200_speed.png", "h200_roofline.png"]
    for name in written[1:]:
        assert Path(name).read_bytes().startswith(b"\x89PNG")
    text = Path(written[0]).read_text()
    for line in (
        "| correctness | 1 | 1 | 0 | 1 | 10 |",
        "| failed | correctness | 1 | swiglu/none/triton/bf16 | AssertionError: h \\| wrong |",
        "| not_run | correctness | 1 | swiglu/none/triton/fp16 | the budget of 450 s had ended |",
        "| unavailable | bench | 1 | gemm/a/peer | peer does not import |",
        "| swiglu | triton | bf16 | 1 | 1 | 0 | 0 | 4.0e-03 |",
        "| memcheck | swiglu | triton | passed | ERROR SUMMARY: 0 |",
        "| workload | pass | contender | ms on NVIDIA H200 |",
        "| gemm/a | fwd | **triton** | 0.1250 | 0.1125 - 0.1375 | 632 | 344 | 80.0% |  | 0.94 x fast |",
        "| swiglu/a/triton/fwd | _kernel | 1234 |  | 88 |",
        "![](h200_roofline.png)",
    ):
        assert line in text, line
    assert "tflops >= 620: met" in text
    assert ">= 1.00 x absent: not measured" in text


def test_render_of_a_run_without_timings(tmp_path: Path, content: Content) -> None:
    del content["stages"]["bench"]
    path = tmp_path / "r.json"
    path.write_text(json.dumps(content))
    assert main(["render", str(path)]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["r.json", "r.md"]


def test_compare_shows_ratios_and_finds_what_is_worse(
    tmp_path: Path, content: Content, capsys: pytest.CaptureFixture[str]
) -> None:
    other = copy.deepcopy(content)
    rows = other["stages"]["bench"]["rows"]
    rows["gemm/a/triton"]["passes"]["fwd"]["ms"] = 0.250
    rows["gemm/a/loop"]["passes"]["fwd"]["ms"] = 0.480  # a peer: no concern of ours
    rows["gemm/b/triton"] = _row(1.0, ours=True)
    other["stages"]["correctness"]["rows"]["swiglu/tokens/triton/bf16"]["status"] = "failed"
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, what in zip(paths, (content, other), strict=True):
        path.write_text(json.dumps(what))
    files = [str(path) for path in paths]
    assert compare.main(files) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "gemm/a fwd triton 0.1250 0.2500 0.50" in lines
    assert "gemm/a fwd cuda 0.1200 0.1200 1.00" in lines
    assert "gemm/b fwd triton - 1.0000 -" in lines
    assert "correctness swiglu/tokens/triton/bf16 passed failed" in lines
    assert compare.main([*files, "--limit", "1.15"]) == 1
    out = capsys.readouterr().out
    assert "gemm/a fwd triton: 2.00 times as long" in out
    assert "correctness swiglu/tokens/triton/bf16: passed, then failed" in out
    assert "loop: " not in out
    assert compare.main([files[0], files[0], "--limit", "1.0"]) == 0
    rows["gemm/a/triton"]["passes"]["fwd"]["ms"] = float("nan")
    paths[1].write_text(json.dumps(other))
    assert compare.main([*files, "--limit", "3"]) == 1
    assert "gemm/a fwd triton: nan times as long" in capsys.readouterr().out
