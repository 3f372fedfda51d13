"""Choice of back end: order, forcing, reasons, and the environment variable."""

from __future__ import annotations

import pytest
import torch

from parrot_kernels import _extension
from parrot_kernels.expert_mlp import cpu_impl, reference
from parrot_sys.ops import force_backend, registry, topk_routing


def expert_args(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    shapes = ((2, 3, 4), (5, 2, 6, 4), (5, 6, 4), (2, 5))
    return tuple(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes)


def test_auto_prefers_cpu_over_reference() -> None:
    assert registry.select("expert_mlp", *expert_args()) is cpu_impl


def test_auto_falls_back_by_dtype_and_device() -> None:
    assert registry.select("expert_mlp", *expert_args(torch.float64)) is reference
    assert registry.select("expert_mlp", *expert_args(device="meta")) is reference


def test_auto_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "why_not", lambda: "not built")
    assert registry.select("expert_mlp", *expert_args()) is reference
    assert registry.available()["expert_mlp"]["cpu"] == "not built"


def test_forced_backend_that_cannot_run_raises_with_the_reason() -> None:
    with force_backend("cpu"), pytest.raises(NotImplementedError, match=r"expert_mlp.*'cpu' cannot run.*float64"):
        registry.select("expert_mlp", *expert_args(torch.float64))
    with force_backend("cuda"), pytest.raises(NotImplementedError, match=r"topk_routing.*'cuda' cannot run"):
        topk_routing(torch.zeros(2, 3), 1, renormalize=False)


def test_force_backend_nests_and_ends_with_the_block() -> None:
    with force_backend("reference"):
        with force_backend("cpu"):
            assert registry.select("expert_mlp", *expert_args()) is cpu_impl
        assert registry.select("expert_mlp", *expert_args()) is reference
    assert registry.select("expert_mlp", *expert_args()) is cpu_impl


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"cuda, triton, cpu, reference, got 'cpp'"), force_backend("cpp"):
        pass


def test_environment_forces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARROT_BACKEND", "reference")
    assert registry.select("expert_mlp", *expert_args()) is reference
    with force_backend("cpu"):  # the innermost wish wins
        assert registry.select("expert_mlp", *expert_args()) is cpu_impl


def test_available_names_every_op_and_backend() -> None:
    table = registry.available()
    assert set(table) == set(registry.OPS)
    for op, row in table.items():
        assert list(row) == ["cuda", "triton", "cpu", "reference"]
        assert row["reference"] is None, op
