"""Op tests run on NaN-poisoned memory, and can force a back end and see that it ran."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType

import pytest
import torch
from torch import Tensor

from parrot_kernels.launches import Launch
from parrot_kernels.testing import poisoned_memory
from parrot_sys import platform
from parrot_sys.ops import registry
from tests import cuda_emulator

BACKEND_MODULES = {
    "reference": "parrot_kernels.{op}.reference",
    "cpu": "parrot_kernels.{op}.cpu_impl",
    "triton": "parrot_kernels.{op}.triton_impl",
    "cuda": "parrot_kernels.{op}.cuda_impl",
}


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


@pytest.fixture(scope="session")
def triton_device() -> torch.device:
    """Where Triton's kernels run in this process: compiled on a GPU, else interpreted on the CPU."""
    return torch.device("cuda" if platform.cuda_available() else "cpu")


@pytest.fixture
def cuda_device() -> Iterator[torch.device]:
    """Where the CUDA kernels run in this process: on a GPU, else their sources compiled for the CPU."""
    if platform.cuda_available():
        yield torch.device("cuda")
        return
    with cuda_emulator.in_place_of_cuda():
        yield torch.device("cpu")


@pytest.fixture
def device_of(triton_device: torch.device) -> Callable[[str], torch.device]:
    """`device_of(backend)`: where its inputs must be."""
    return lambda backend: triton_device if backend == "triton" else torch.device("cpu")


@pytest.fixture
def ran_on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., AbstractContextManager[None]]:
    """`with ran_on(backend, op, *launchers)`: forces the back end, and asserts that each launcher of it was called."""

    @contextmanager
    def force(backend: str, op: str, *launchers: str) -> Iterator[None]:
        module = importlib.import_module(BACKEND_MODULES[backend].format(op=op))
        called: set[str] = set()

        def watched(name: str) -> Callable[..., object]:
            launcher = getattr(module, name)

            def call(*args: object) -> object:
                called.add(name)
                return launcher(*args)

            return call

        with monkeypatch.context() as patch, registry.force_backend(backend):
            for name in launchers:
                patch.setattr(module, name, watched(name))
            yield
        assert called == set(launchers), (
            f"launchers of {backend} that ran: {sorted(called)}, wanted {sorted(launchers)}"
        )

    return force


@pytest.fixture
def watch_launches(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType], list[str]]:
    """`watch_launches(triton_impl)`: a list that every launch of a `*_kernel` of the module appends its name to."""

    def watch(module: ModuleType) -> list[str]:
        names = {id(kernel): name for name, kernel in vars(module).items() if name.endswith("_kernel")}
        launched: list[str] = []
        call = Launch.__call__

        def noting(self: Launch, *tensors: Tensor | None) -> None:
            if id(self.kernel) in names:
                launched.append(names[id(self.kernel)])
            call(self, *tensors)

        monkeypatch.setattr(Launch, "__call__", noting)
        return launched

    return watch
