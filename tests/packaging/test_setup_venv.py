"""What .ci/setup_venv.py says before it installs anything."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def setup_venv() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / ".ci" / "setup_venv.py"
    spec = importlib.util.spec_from_file_location("setup_venv", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("version", "suitable"),
    [("2.13.0+cpu", True), ("2.11.0", True), ("3.0", True), ("2.10.1", False), ("2.9.0a0+git", False)],
)
def test_torch_versions(setup_venv: ModuleType, version: str, suitable: bool) -> None:
    assert setup_venv.is_suitable(version) is suitable


def test_the_torch_of_this_python_is_found(setup_venv: ModuleType) -> None:
    import torch

    assert setup_venv.find_torch(sys.executable) == (torch.__version__, str(Path(torch.__file__).parents[1]))


def test_a_python_that_is_too_old_is_named(setup_venv: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    with pytest.raises(SystemExit, match=r"3\.11 or 3\.12 is needed .* is 3\.10; .* PYTHON="):
        setup_venv.check_machine()


def test_a_missing_module_names_the_debian_package(setup_venv: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"no venv module\n.*apt-get install python3\.1\d-venv"):
        setup_venv.check_machine()


def test_a_missing_compiler_names_the_debian_package(setup_venv: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler found \(no-such-compiler -m64\)\n.*apt-get install g\+\+"):
        setup_venv.check_machine()


def test_constraints_hold_torch_and_triton_fixed(
    setup_venv: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(setup_venv, "VENV", tmp_path)
    versions = {"torch": "2.11.0+cu130", "triton": None}
    monkeypatch.setattr(setup_venv, "installed_version", versions.get)
    lines = setup_venv.write_constraints().read_text().splitlines()
    assert lines[-2:] == ["torch==2.11.0+cu130", "triton==3.6.0"]
    versions["triton"] = "3.9.1"
    assert setup_venv.write_constraints().read_text().splitlines()[-1] == "triton==3.9.1"
