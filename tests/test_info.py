"""parrot info: every op and back end with a reason, and which optional package really is the one that is meant."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from parrot_sys import info
from parrot_sys.ops import registry


def test_json_lists_every_op_and_back_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["ops"]) == set(registry.OPS)
    for backends in facts["ops"].values():
        assert list(backends) == list(registry.BACKENDS)
        assert backends["reference"] is None
    assert facts["versions"]["torch"]
    assert facts["build"]["extension"] == "loaded"


@pytest.mark.parametrize("form", [[], ["--markdown"]])
def test_text_gives_each_reason(form: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(form) == 0
    text = capsys.readouterr().out
    for op, backends in registry.available().items():
        assert op in text
        for reason in filter(None, backends.values()):
            assert reason in text


def test_an_invalid_back_end_is_shown_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARROT_BACKEND", "cudda")
    assert info.collect()["environment"]["PARROT_BACKEND"].endswith("reference, got 'cudda'")


def fake_package(folder: Path, name: str, *parts: str) -> None:
    for path in (folder / name, *(folder / name / part for part in parts)):
        path.mkdir(parents=True, exist_ok=True)
        (path / "__init__.py").touch()


def test_the_pypi_project_apex_is_not_taken_for_nvidias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    fake_package(tmp_path, "apex", "lib")
    assert "not NVIDIA's" in info.collect()["optional"]["apex"]
    fake_package(tmp_path, "apex", "multi_tensor_apply")
    assert "without its C++ extensions" in info.collect()["optional"]["apex"]
    (tmp_path / "amp_C.py").touch()
    importlib.invalidate_caches()
    assert info.collect()["optional"]["apex"].startswith("yes")


def test_transformer_engine_needs_its_torch_part(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"transformer-engine": "2.20.2"}
    monkeypatch.setattr(info, "_version", versions.get)
    assert "without its torch part" in info.collect()["optional"]["transformer_engine"]
    versions["transformer-engine-torch"] = "2.20.2"
    assert info.collect()["optional"]["transformer_engine"] == "yes: 2.20.2"
