"""Locks of output directories, and signals from a program to those that it has started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from parrot_sys.errors import ConfigError
from parrot_sys.files import save_tensors
from parrot_sys.locks import OutputLock
from tests.evaluation.tables import write_table

ROOT = Path(__file__).parents[2]
FIXTURE = ROOT / "tests" / "fixtures" / "parrot_tiny" / "model"
SECONDS = 60.0
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}{os.pathsep}{ROOT / 'train'}",
    "OMP_NUM_THREADS": "1",
}
HOLD = """
import sys, time
from parrot_sys.locks import OutputLock
from tests.evaluation.tables import write_table
lock = OutputLock(sys.argv[1])
print(flush=True)
time.sleep(60)
"""
WORKER = """
    import os, signal, sys, time
    from pathlib import Path
    from parrot_sys.cli import run_main

    def main(argv):
        signal.signal(signal.SIGTERM, lambda *_: (Path(argv[0], "saved" + os.environ["RANK"]).touch(), sys.exit(0)))
        Path(argv[0], os.environ["RANK"]).write_text(str(os.getpid()))
        time.sleep(60)

    run_main(main, sys.argv[1:])
"""
PIPELINE = """
    import sys
    from pathlib import Path
    from parrot_sys.cli import run_main
    from studies.pipeline import Pipeline

    def main(argv):
        pipeline = Pipeline(Path(argv[0]) / "work", say=lambda line: print(line, flush=True))
        command = [sys.executable, "-m", "parrot_sys.launcher", "--standalone", "--nproc-per-node", "2", *argv[1:]]
        pipeline.step("stage", lambda folder: pipeline.command([*command, argv[0]]))
        return 0

    sys.exit(run_main(main, sys.argv[1:], prog="demo.py"))
"""


def _wait(paths: list[Path], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + SECONDS
    while not all(path.exists() and path.read_text() for path in paths):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "the workers did not start"
        time.sleep(0.05)


def _gone(pids: list[int]) -> bool:
    end = time.monotonic() + SECONDS
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _demo(folder: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """A pipeline under which two workers run, and the workers' process ids."""
    worker, demo = folder / "worker.py", folder / "demo.py"
    worker.write_text(textwrap.dedent(WORKER))
    demo.write_text(textwrap.dedent(PIPELINE))
    process = subprocess.Popen(
        [sys.executable, str(demo), str(folder), str(worker)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    paths = [folder / str(rank) for rank in range(2)]
    _wait(paths, process)
    return process, [int(path.read_text()) for path in paths]


def test_a_second_process_is_refused_and_a_stale_lock_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], env=ENVIRONMENT, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(ConfigError) as error:
        OutputLock(tmp_path)
    assert f"process {holder.pid} on host {socket.gethostname()}" in str(error.value)
    holder.kill()
    holder.wait()
    with caplog.at_level("INFO", "parrot_sys"):
        lock = OutputLock(tmp_path)
    lock.release()
    assert lock.path.read_text() == ""
    OutputLock(tmp_path).release()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_pipeline_reaches_the_workers(number: signal.Signals, tmp_path: Path) -> None:
    process, workers = _demo(tmp_path)
    process.send_signal(number)
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + number
    assert "Traceback" not in output
    assert "the same command goes on here" in output
    assert all((tmp_path / f"saved{rank}").exists() for rank in range(2)), "the workers came to their end"
    assert _gone(workers)


def test_a_second_ctrl_c_ends_all_at_once(tmp_path: Path) -> None:
    process, workers = _demo(tmp_path)
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)  # they cannot come to their end
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert "Traceback" not in output
    assert _gone(workers)


def test_workers_end_with_what_started_them(tmp_path: Path) -> None:
    process, workers = _demo(tmp_path)
    process.kill()
    process.communicate()
    assert _gone(workers)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_weights_have_the_mode_of_the_umask(mask: int, tmp_path: Path) -> None:
    import torch

    before = os.umask(mask)
    try:
        save_tensors({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask


def test_an_evaluation_in_use_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    write_table(tmp_path / "t_en.tsv", [{"index": 1, "question": "q?", "A": "a", "B": "b", "answer": "A"}])
    lock = OutputLock(tmp_path / "eval")
    arguments = ["--checkpoint", str(FIXTURE), "--data", str(tmp_path / "t_en.tsv"), "--output", str(tmp_path / "eval")]
    command = [sys.executable, "-m", "parrot_sys", "eval", *arguments]
    refused = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    message = " ".join(refused.stderr.split())
    assert f"is in use by process {os.getpid()} on host {socket.gethostname()}" in message
    lock.release()
