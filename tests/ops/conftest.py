"""Op tests run on NaN-poisoned memory, and can force a back end and see that it ran."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from parrot_kernels.testing import poisoned_memory
from parrot_sys.ops import registry

BACKEND_MODULES = {"reference": "parrot_kernels.{op}.reference", "cpu": "parrot_kernels.{op}.cpu_impl"}


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


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
