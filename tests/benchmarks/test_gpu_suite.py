"""The suite's stages through its command line, on the CPU: the same code as on a GPU, with tiny shapes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import harness
from benchmarks.gpu_suite import __main__ as suite_main
from benchmarks.gpu_suite import bench, profile, sanitize
from benchmarks.gpu_suite.__main__ import main
from parrot_kernels.swiglu import cpu_impl

ONLY = ("--only", "swiglu/tokens/cpu")  # one case in three dtypes, of which float16 is refused


def suite(stage: str, path: Path, *options: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code, and rows of the stage."""
    code = main([stage, "--json", str(path), "--device", "cpu", "--workers", "1", *options])
    return code, json.loads(path.read_text())["stages"][stage]["rows"]


def break_swiglu(monkeypatch: pytest.MonkeyPatch, wrong: Any) -> None:
    right = cpu_impl.swiglu_fwd
    monkeypatch.setattr(cpu_impl, "swiglu_fwd", lambda *args: wrong(right(*args)))


def test_correctness_passes_and_is_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    code, rows = suite("correctness", path, *ONLY)
    assert code == 0
    assert {name: row["status"] for name, row in rows.items()} == {
        "swiglu/tokens/cpu/bf16": "passed",
        "swiglu/tokens/cpu/fp32": "passed",
        "swiglu/tokens/cpu/fp16": "unavailable",
    }
    assert set(rows["swiglu/tokens/cpu/fp32"]["errors"]) == {"h", "grad_z", "grad_weights"}
    assert max(rows["swiglu/tokens/cpu/fp32"]["errors"].values()) < 1e-5
    assert "got torch.float16" in rows["swiglu/tokens/cpu/fp16"]["error"]
    assert suite("correctness", path, *ONLY) == (0, rows)
    content = json.loads(path.read_text())
    assert [run["begun"] for run in content["stages"]["correctness"]["runs"]] == [3, 0]
    assert content["machine"]["torch"] == torch.__version__
    assert set(content["machine"]["packages"]) >= {"numpy", "triton", "liger-kernel", "sgl-deep-gemm"}


def test_all_stages_in_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here each run of a stage has time for one row: what it leaves is done by the next."""
    run_rows = suite_main.run_rows

    def one_row(names: list[str], *args: Any, **options: Any) -> dict[str, str]:
        return run_rows(names[:1], *args, **options) | dict.fromkeys(names[1:], "out of time")

    monkeypatch.setattr(suite_main, "run_rows", one_row)
    path = tmp_path / "r.json"
    only = ("--only", "swiglu/tokens/cpu", "--only", "swiglu/cpu/cpu")
    code = main(["all", "--json", str(path), "--device", "cpu", *only])
    stages = json.loads(path.read_text())["stages"]
    assert code == 0
    assert set(stages["correctness"]["rows"]) == {f"swiglu/tokens/cpu/{dtype}" for dtype in ("bf16", "fp32", "fp16")}
    assert [run["begun"] for run in stages["correctness"]["runs"]] == [1, 1, 1]
    assert stages["bench"]["rows"]["swiglu/cpu/cpu"]["status"] == "passed"
    assert (tmp_path / "r.md").exists()


def test_the_first_call_checks_results_and_measures_the_decisive_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bench rows keep their share of the time, however much correctness would take."""
    begun: list[tuple[list[str], float]] = []
    run_rows = suite_main.run_rows

    def no_row(names: list[str], work: Any, record: Any, **options: Any) -> dict[str, str]:
        if names == ["cpu"]:  # the description of the machine
            return run_rows(names, work, record, **options)
        begun.append((names, options["seconds"]))
        return dict.fromkeys(names, "out of time")

    monkeypatch.setattr(suite_main, "run_rows", no_row)
    path = tmp_path / "r.json"
    code = main(["first", "--json", str(path), "--device", "cpu", "--budget", "300"])
    assert code == suite_main.INCOMPLETE
    (checked, check_seconds), (measured, bench_seconds) = begun
    assert len(checked) > 100
    assert all(name.endswith("/bf16") for name in checked[: len(checked) // 3])
    assert measured == bench.decisive_rows("cpu")
    assert len(measured) == 10
    assert check_seconds <= 200
    assert bench_seconds >= 100 - 60  # less what describing the machine took, twice


def test_decisive_rows_come_first_on_a_gpu() -> None:
    rows = bench.rows("cuda")
    assert tuple(rows[:10]) == bench.DECISIVE
    assert len(set(rows)) == len(rows)


def test_each_row_names_its_card(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    _, rows = suite("correctness", path, *ONLY)
    device = json.loads(path.read_text())["machine"]["device"]
    assert device
    assert {row["device"] for row in rows.values()} == {device}


def test_a_wrong_kernel_fails_until_it_is_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    with monkeypatch.context() as patch:
        break_swiglu(patch, lambda h: 1.05 * h)
        code, rows = suite("correctness", path, *ONLY)
    assert code == 1
    assert rows["swiglu/tokens/cpu/bf16"]["status"] == rows["swiglu/tokens/cpu/fp32"]["status"] == "failed"
    assert rows["swiglu/tokens/cpu/fp32"]["error"].startswith("AssertionError: h: error")
    assert suite("correctness", path, *ONLY)[0] == 1, "a failed row stays failed"
    code, rows = suite("correctness", path, *ONLY, "--retry")
    assert (code, rows["swiglu/tokens/cpu/fp32"]["status"]) == (0, "passed")


def test_a_kernel_that_leaves_rows_unwritten_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unwritten(h: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(h)
        out[:-1] = h[:-1]
        return out

    break_swiglu(monkeypatch, unwritten)
    code, rows = suite("correctness", tmp_path / "r.json", *ONLY)
    assert code == 1
    assert "h: error inf exceeds" in rows["swiglu/tokens/cpu/fp32"]["error"]


def test_a_kernel_that_gives_other_bits_each_time_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def racing(h: torch.Tensor) -> torch.Tensor:
        racing.calls = getattr(racing, "calls", 0) + 1  # type: ignore[attr-defined]
        return h * (1 + racing.calls * torch.finfo(h.dtype).eps)  # type: ignore[attr-defined]

    break_swiglu(monkeypatch, racing)
    code, rows = suite("correctness", tmp_path / "r.json", "--only", "swiglu/tokens/cpu/fp32")
    assert code == 1
    assert "a second run gives another h" in rows["swiglu/tokens/cpu/fp32"]["error"]


def test_a_kernel_that_crashes_its_process_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_swiglu(monkeypatch, lambda h: os.kill(os.getpid(), signal.SIGKILL))
    code, rows = suite("correctness", tmp_path / "r.json", "--only", "swiglu/tokens/cpu/fp32")
    assert code == 1
    assert rows["swiglu/tokens/cpu/fp32"]["error"] == "its process ended with SIGKILL"


def test_bench_measures_ours_and_peers_and_says_which_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)  # as where it is not installed
    code, rows = suite("bench", tmp_path / "r.json", "--only", "swiglu/cpu/", "--only", "ceiling/copy")
    assert code == 0
    statuses = {name: row["status"] for name, row in rows.items()}
    assert statuses.pop("swiglu/cpu/liger_unweighted") == "unavailable"
    assert statuses == dict.fromkeys(
        ["ceiling/copy/torch", "swiglu/cpu/cpu", "swiglu/cpu/reference", "swiglu/cpu/torch"], "passed"
    )
    assert (
        "liger_kernel.ops.swiglu does not import: ModuleNotFoundError" in rows["swiglu/cpu/liger_unweighted"]["error"]
    )
    own = rows["swiglu/cpu/cpu"]
    assert own["ours"]
    assert own["wanted"]["fwd"] == {"share": 0.85}
    assert set(own["difference"]) == {"output_0", "grad_z", "grad_weights"}
    for times in own["passes"].values():
        assert {"ms", "p10_ms", "p90_ms", "min_ms", "rounds", "input_sets", "tflops", "gbytes_s"} <= set(times)


def test_bench_of_a_wrong_kernel_times_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_swiglu(monkeypatch, lambda h: 1.05 * h)
    code, rows = suite("bench", tmp_path / "r.json", "--only", "swiglu/cpu/torch", "--only", "swiglu/cpu/reference")
    assert code == 1
    for row in rows.values():
        assert row["status"] == "failed"
        assert row["error"].startswith("Mismatch: differs from ours by")
        assert "passes" not in row


def test_what_the_budget_leaves_out_is_listed_and_done_next_time(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    code, rows = suite("correctness", path, *ONLY, "--budget", "0")
    assert code == 3
    assert {row["status"] for row in rows.values()} == {"not_run"}
    assert {row["error"] for row in rows.values()} == {"the budget of 0 s had ended"}
    code, rows = suite("correctness", path, *ONLY)
    assert code == 0
    assert sorted(row["status"] for row in rows.values()) == ["passed", "passed", "unavailable"]


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _runs(pid: int) -> bool:
    """Whether the process is there after at most ten seconds of waiting, other than as a zombie."""
    status = Path(f"/proc/{pid}/stat")
    for _ in range(100):
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return False
        time.sleep(0.1)
    return True


def test_resumes_after_a_kill(tmp_path: Path) -> None:
    """Killed outright in the middle: what was recorded stays as it is, and only the rest is run."""
    path = tmp_path / "r.json"
    options = ["--json", str(path), "--device", "cpu", "--only", "/cpu/bf16", "--only", "/reference/bf16"]
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "correctness", *options]
    with subprocess.Popen(command, cwd=harness.ROOT, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 600
        while not path.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        workers = _children(process.pid)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not [pid for pid in workers if _runs(pid)], "a worker outlived the suite"
    before = json.loads(path.read_text())["stages"]["correctness"]["rows"]
    assert before
    code, after = suite("correctness", path, "--only", "swiglu/tokens/cpu", *options[4:])
    assert code == 0
    assert {name: after[name] for name in before} == before
    assert len(after) > len(before), "the kill came too late to leave anything to do"
    assert {row["status"] for row in after.values()} == {"passed", "unavailable"}


def test_results_of_other_sources_are_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    suite("correctness", path, *ONLY)
    content = json.loads(path.read_text())
    content["machine"]["sources"] = "older"
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=r"holds the results of another run .*sources older -> .*--fresh"):
        suite("correctness", path, *ONLY)
    code, rows = suite("correctness", path, "--only", "swiglu/none/cpu/fp32", "--fresh")
    assert (code, list(rows)) == (0, ["swiglu/none/cpu/fp32"])


def test_runs_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A borrowed machine may have none; --commit then names the sources."""
    monkeypatch.setenv("PATH", str(tmp_path))
    path = tmp_path / "r.json"
    for options, commit in (((), "unknown"), (("--fresh", "--commit", "abc"), "abc")):
        assert suite("correctness", path, *ONLY, *options)[0] == 0
        assert json.loads(path.read_text())["machine"]["commit"] == commit


def test_no_stage_times_kernels_for_another() -> None:
    """What small inputs under six processes measured would decide the tiles of the benchmark."""
    command = [sys.executable, "-c", "import benchmarks.gpu_suite.__main__, os; print(sorted(os.environ))"]
    environment = {key: value for key, value in os.environ.items() if "AUTOTUN" not in key}
    done = subprocess.run(command, env=environment, cwd=harness.ROOT, capture_output=True, text=True, check=True)
    assert "AUTOTUN" not in done.stdout


def test_the_sanitizer_is_asked_for_findings_of_kernels_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool, seen = tmp_path / "tool", tmp_path / "seen"
    tool.write_text(f'#!/bin/sh\necho "$@" > {seen}\n')
    tool.chmod(0o755)
    monkeypatch.setattr(sanitize, "tool", lambda _: str(tool))
    suite("sanitize", tmp_path / "r.json", "--only", "memcheck/swiglu/cpu")
    assert "--report-api-errors no" in seen.read_text()


def test_row_limits_fit_into_a_run() -> None:
    """A row that outlasts the budget of a run would never end: each run would begin it anew."""
    budget = suite_main.parse(["bench", "--json", "r.json"]).budget
    limits = {name: module.ROW_SECONDS for name, module in suite_main.STAGES.items()}
    assert all(limit < budget for limit in limits.values())
    assert limits["sanitize"] > limits["correctness"]


@pytest.mark.parametrize(
    ("stage", "only", "name"), [("sanitize", "swiglu/cpu", "compute-sanitizer"), ("profile", "swiglu/cpu/cpu", "ncu")]
)
def test_a_missing_tool_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, only: str, name: str
) -> None:
    for module in (sanitize, profile):
        monkeypatch.setattr(module, "tool", lambda _: None)
    code, rows = suite(stage, tmp_path / "r.json", "--only", only)
    assert code == 0
    assert len(rows) == 2  # two tools, or two passes
    for row in rows.values():
        assert row["status"] == "unavailable"
        assert f"{name}" in row["error"]
        assert "is not on the PATH" in row["error"]


@pytest.mark.parametrize(
    ("stage", "only", "wanted"),
    [("sanitize", "memcheck/swiglu/cpu", "no summary"), ("profile", "swiglu/cpu/cpu/fwd", "no figures")],
)
def test_a_tool_that_does_not_work_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, only: str, wanted: str
) -> None:
    """`env` knows none of the options."""
    for module in (sanitize, profile):
        monkeypatch.setattr(module, "tool", lambda _: "/usr/bin/env")
    code, rows = suite(stage, tmp_path / "r.json", "--only", only)
    assert code == 0
    (row,) = rows.values()
    assert row["status"] == "unavailable"
    assert row["error"].startswith(wanted)
    assert "option" in row["error"], "what the tool itself said"
