"""The stage `accelerators`: its comparison runs here without accelerators, and its rows say what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.gpu_suite import accelerators
from benchmarks.gpu_suite.__main__ import main
from parrot_sys.megatron import norms

CPU = torch.device("cpu")


@pytest.mark.parametrize("part", ["decoder", "vision"])
def test_every_output_and_gradient_is_compared(part: str) -> None:
    errors = accelerators.compare(part, CPU)
    assert len(errors) > 10
    assert 0 < max(errors.values()) < 0.1  # bfloat16 against float64


def test_a_wrong_norm_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(nn.RMSNorm):
        def __init__(self, config: object, hidden_size: int, eps: float) -> None:
            super().__init__(hidden_size, eps=eps, dtype=torch.bfloat16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 1.1 * super().forward(x)

    built = norms.backends.fused_norm
    calls = []

    def fused_norm(kind: str) -> object:
        accelerated = not norms.backends._without.get()
        calls.append(accelerated)
        return Wrong if accelerated else built(kind)

    monkeypatch.setattr(norms.backends, "fused_norm", fused_norm)
    with pytest.raises(AssertionError, match="output: error"):
        accelerators.compare("decoder", CPU)
    assert set(calls) == {True, False}


def test_rows_say_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    assert main(["accelerators", "--json", str(path), "--device", "cpu"]) == 0
    rows = json.loads(path.read_text())["stages"]["accelerators"]["rows"]
    assert {row["status"] for row in rows.values()} == {"unavailable"}
    assert "not installed" in rows["transformer_engine/decoder"]["error"]
