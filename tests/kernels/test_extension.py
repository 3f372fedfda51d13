"""The C++ extension is there, and says why when it is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from parrot_kernels import _extension, env


@pytest.fixture
def fresh_extension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that `_extension` takes for its own."""
    monkeypatch.setattr(_extension, "__file__", str(tmp_path / "_extension.py"))
    monkeypatch.setattr(_extension, "why_not", _extension.why_not.__wrapped__)
    return tmp_path


def test_the_extension_is_loaded() -> None:
    assert _extension.why_not() is None
    assert isinstance(torch.ops.parrot_ext.has_cuda_kernels(), bool)
    assert (_extension.why_not_cuda() is None) == torch.ops.parrot_ext.has_cuda_kernels()


def test_a_missing_binary_says_how_to_build_it(fresh_extension: Path) -> None:
    for reason in (_extension.why_not(), _extension.why_not_cuda()):
        assert reason is not None
        assert "PARROT_SKIP_EXTENSION" in reason
        assert "pip install" in reason


def test_a_binary_that_does_not_load_gives_the_reason(fresh_extension: Path) -> None:
    (fresh_extension / "_C.abi3.so").write_text("no ELF file")
    reason = _extension.why_not()
    assert reason is not None
    assert "_C.abi3.so does not load with torch" in reason


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PARROT_BACKEND", "TRITON_INTERPRET", "PARROT_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    assert (env.backend(), env.triton_interpret(), env.show_traceback()) == ("auto", False, False)
    monkeypatch.setenv("PARROT_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PARROT_TRACEBACK", "1")
    assert (env.backend(), env.triton_interpret(), env.show_traceback()) == ("triton", True, True)
    monkeypatch.setenv("PARROT_BACKEND", "cudda")
    with pytest.raises(
        ValueError, match="PARROT_BACKEND must be one of auto, cuda, triton, cpu, reference, got 'cudda'"
    ):
        env.backend()
