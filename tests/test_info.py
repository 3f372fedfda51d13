"""parrot info: every op and back end with a reason, and what models are built of."""

from __future__ import annotations

import json

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


def test_it_says_what_models_are_built_of() -> None:
    facts = info.collect()
    assert facts["optional"]["transformer_engine"].startswith("no: ")
    assert facts["layers"]["linear layers"] == "Megatron-Core"
    assert f"RMSNorm              {facts['layers']['RMSNorm']}" in info.render(facts)
