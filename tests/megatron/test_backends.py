"""Which layers are built, with and without accelerators; and that checkpoints do not tell.

Neither Transformer Engine nor apex runs without a GPU: here their packages are only pretended to be installed, which is
enough for the choice. Their kernels are compared by the GPU suite.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from parrot_sys import platform
from parrot_sys.megatron.runtime import backends
from parrot_sys.megatron.runtime.initialize import initialize, shutdown
from parrot_sys.systems.build import build_model
from tests.megatron.parrot_reference import CONFIG

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has one, as far as the choice is concerned."""
    monkeypatch.setattr(platform, "cuda_available", lambda: True)


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Installed distributions."""
    found: dict[str, str] = {}
    monkeypatch.setattr(backends, "_version", found.get)
    return found


@pytest.fixture
def nvidia_apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages with the names of NVIDIA's."""
    monkeypatch.syspath_prepend(str(tmp_path))
    _package(tmp_path, "apex", "multi_tensor_apply")
    (tmp_path / "amp_C.py").touch()
    importlib.invalidate_caches()


def _package(folder: Path, name: str, *parts: str) -> None:
    for path in (folder / name, *(folder / name / part for part in parts)):
        path.mkdir(parents=True, exist_ok=True)
        (path / "__init__.py").touch()


@pytest.mark.usefixtures("gpu")
def test_transformer_engine_needs_its_torch_part(versions: dict[str, str]) -> None:
    assert "not installed" in str(backends.transformer_engine())
    versions["transformer-engine"] = "2.20.2"
    assert "without its torch part" in str(backends.transformer_engine())
    assert backends.linear_backend() == "none"
    versions["transformer-engine-torch"] = "2.20.2"
    assert backends.transformer_engine() is None


@pytest.mark.usefixtures("gpu")
def test_the_pypi_project_apex_is_not_taken_for_nvidias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    _package(tmp_path, "apex", "lib")
    assert "not NVIDIA's" in str(backends.apex())
    _package(tmp_path, "apex", "multi_tensor_apply")
    assert "without its C++ extensions" in str(backends.apex())
    (tmp_path / "amp_C.py").touch()
    importlib.invalidate_caches()
    assert backends.apex() is None


@pytest.mark.usefixtures("gpu")
def test_transformer_engine_comes_first(versions: dict[str, str], nvidia_apex: None) -> None:
    versions |= {"transformer-engine": "2.20.2", "transformer-engine-torch": "2.20.2"}
    assert backends.norm_backend("RMSNorm") == backends.norm_backend("LayerNorm") == "transformer_engine"
    assert backends.linear_backend() == backends.adam_backend() == "transformer_engine"
    with backends.without_accelerators():
        assert backends.norm_backend("LayerNorm") == backends.linear_backend() == "none"


@pytest.mark.usefixtures("gpu", "versions", "nvidia_apex")
def test_apex_serves_what_it_has() -> None:
    assert backends.norm_backend("LayerNorm") == backends.adam_backend() == "apex"
    assert backends.norm_backend("RMSNorm") == backends.linear_backend() == "none"
    assert backends.fused_norm("LayerNorm").__name__ == "FusedLayerNorm"


@pytest.mark.usefixtures("gpu", "nvidia_apex")
def test_models_on_the_cpu_take_neither(versions: dict[str, str]) -> None:
    versions |= {"transformer-engine": "2.20.2", "transformer-engine-torch": "2.20.2"}
    for device in (CPU, torch.device("meta")):
        with backends.building_for(device):
            assert backends.fused_norm("LayerNorm") is None
            assert backends.parallel_linear_layers() == (ColumnParallelLinear, RowParallelLinear)
    with backends.building_for(CUDA):
        assert backends.norm_backend("LayerNorm") == "transformer_engine"


@pytest.mark.usefixtures("nvidia_apex")
def test_nothing_is_taken_where_there_is_no_gpu(versions: dict[str, str]) -> None:
    if platform.cuda_available():
        pytest.skip("this machine has a GPU")  # where what is installed is taken, which the tests above cover
    versions |= {"transformer-engine": "2.20.2", "transformer-engine-torch": "2.20.2"}
    assert backends.transformer_engine() == backends.apex() == "it needs a CUDA device"
    assert set(backends.in_use().values()) == {"torch", "Megatron-Core", "parrot_sys"}


@pytest.fixture
def _groups() -> Iterator[None]:
    initialize()
    yield
    shutdown()


@pytest.mark.usefixtures("_groups")
def test_checkpoints_hold_parameters_only() -> None:
    """Layers with and without `_extra_state` have the same checkpoint, and load each other's."""
    model = build_model(CONFIG)
    assert any(name.endswith("_extra_state") for name in model.state_dict())
    state = model.sharded_state_dict()
    assert set(state) == {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    assert not any(isinstance(value, ShardedObject) for value in state.values())
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("_extra_state")}
    model.load_state_dict(weights)
    del weights["moe.w_down"]
    with pytest.raises(RuntimeError, match=r"moe\.w_down"):
        model.load_state_dict(weights)
