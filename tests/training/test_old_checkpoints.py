"""Checkpoints of version 0.1 (tests/fixtures/checkpoints_0_1/make.py) go on as that version went on, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cpuinfo import get_cpu_info

from parrot_sys.config_values import config_from_dict, read_yaml
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.registry import all_parts, saved_bypass
from parrot_sys.training.config import TrainConfig
from tests.training.tiny import losses, run

ROOT = Path(__file__).parents[2]
CHECKPOINTS = ROOT / "tests" / "fixtures" / "checkpoints_0_1"


def with_new_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of version 0.1: one for the rate of each part, and switches for experts, routers and TensorBoard."""
    optimizer = dict(settings["optimizer"])
    parts = {f"{part}_lr": part for part in all_parts()}
    lrs = {part: optimizer.pop(name) for name, part in parts.items() if name in optimizer}
    bypass = saved_bypass(settings, config_from_dict(ParrotConfig, settings["model"]))
    logging = dict(settings["logging"])
    logging["trackers"] = ["tensorboard"] if logging.pop("tensorboard") else []
    kept = {name: value for name, value in settings.items() if name not in ("use_moe", "use_router")}
    return {**kept, "bypass": list(bypass), "logging": logging, "optimizer": {**optimizer, "lrs": lrs}}


@pytest.mark.parametrize("system", ["parrot", "wings", "multimodal_gpt"])
def test_the_steps_that_follow_are_those_of_that_version(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # the settings name files from there
    settings = with_new_names(read_yaml(CHECKPOINTS / f"{system}.yaml"))
    config = config_from_dict(TrainConfig, {**settings, "output": str(tmp_path)})
    shutil.copytree(CHECKPOINTS / system, tmp_path / "checkpoints")
    (summary,) = run(config)
    assert summary["steps"] == 5
    expected = json.loads((CHECKPOINTS / f"{system}.json").read_text(encoding="utf-8"))
    wanted = [(step["step"], step["loss"], step["grad_norm"]) for step in expected["steps"]]
    here = {
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_vendor": get_cpu_info()["vendor_id_raw"],  # the matrix products of each have their own order of sums
    }
    if here != expected["made_with"]:  # sums in another order: the same numbers but for their last bits
        wanted = [(step, pytest.approx(loss, rel=1e-4), pytest.approx(norm, rel=1e-2)) for step, loss, norm in wanted]
    assert losses(config) == wanted
