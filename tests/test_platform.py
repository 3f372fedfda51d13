"""Devices by name."""

from __future__ import annotations

import pytest
import torch

from parrot_sys import platform
from parrot_sys.errors import ConfigError


def test_devices_that_exist() -> None:
    assert platform.parse_device("cpu") == torch.device("cpu")
    assert platform.parse_device(None) == platform.device()


@pytest.mark.parametrize("name", ["tpu", "meta", "cuda:999", ""])
def test_devices_that_do_not_exist(name: str) -> None:
    with pytest.raises(ConfigError, match=r"device must be .*got"):
        platform.parse_device(name)


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "cuda_available", lambda: False)
    with pytest.raises(ConfigError, match=r"this machine's 0 GPUs or cpu, got 'cuda'"):
        platform.parse_device("cuda")
