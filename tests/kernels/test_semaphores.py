"""Counters outlive a call: they are kept by stream, and never come from the memory of a CUDA graph."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest
import torch

from parrot_kernels import semaphores as module
from parrot_kernels.semaphores import semaphores
from parrot_sys.ops import force_backend, text_guided_routing

CUDA = torch.device("cuda", 0)


class PlayedStream:
    """A stream of the device that is played: knows which streams it waits for."""

    def __init__(self, number: int) -> None:
        self.cuda_stream = number
        self.awaited: list[PlayedStream] = []

    def wait_stream(self, other: PlayedStream) -> None:
        self.awaited.append(other)


class PlayedDevice:
    """The parts of torch.cuda that `semaphores` sees; allocations of a captured thread or stream go to the pool."""

    def __init__(self) -> None:
        self.current: dict[int, PlayedStream] = {}
        self.main, self.streams = PlayedStream(7), 7
        self.pooled_thread: int | None = None
        self.capturing = False
        self.pool: list[torch.Tensor] = []

    def current_stream(self, device: torch.device) -> PlayedStream:
        return self.current.get(threading.get_ident(), self.main)

    def new_stream(self, device: torch.device) -> PlayedStream:
        self.streams += 1
        return PlayedStream(self.streams)

    @contextlib.contextmanager
    def on(self, stream: PlayedStream) -> Iterator[None]:
        self.current[threading.get_ident()] = stream
        yield
        del self.current[threading.get_ident()]

    def zeros(self, count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        made = torch.full((count,), 0, dtype=dtype)
        in_pool = self.current_stream(device) is self.main or threading.get_ident() == self.pooled_thread
        if self.pooled_thread is not None and in_pool:
            self.pool.append(made)
        return made


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> PlayedDevice:
    device = PlayedDevice()
    monkeypatch.setattr(module, "_semaphores", {})
    monkeypatch.setattr(torch, "zeros", device.zeros)
    monkeypatch.setattr(torch.cuda, "current_stream", device.current_stream)
    monkeypatch.setattr(torch.cuda, "Stream", device.new_stream)
    monkeypatch.setattr(torch.cuda, "stream", device.on)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: device.capturing)
    return device


def test_the_warm_up_of_a_graph_leaves_no_counters_in_its_pool(played: PlayedDevice) -> None:
    played.pooled_thread = threading.get_ident()
    counters = semaphores(5, CUDA)
    assert not played.pool
    assert len(counters) >= 5
    # The zeros are written on another stream, which the current one waits for.
    assert len(played.main.awaited) == 1
    assert semaphores(5, CUDA) is counters


def test_capture_gets_counters_of_its_own(played: PlayedDevice) -> None:
    kept = semaphores(5, CUDA)
    played.capturing, played.pooled_thread = True, threading.get_ident()
    captured = semaphores(5, CUDA)
    assert captured is not kept
    assert played.pool == [captured]
    played.capturing, played.pooled_thread = False, None
    assert semaphores(5, CUDA) is kept


def test_each_stream_has_its_own_and_more_images_get_more(played: PlayedDevice) -> None:
    first = semaphores(5, CUDA)
    other = PlayedStream(100)
    with played.on(other):
        assert semaphores(5, CUDA) is not first
    assert len(semaphores(5000, CUDA)) >= 5000
    assert first.sum() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_compiled_to_a_graph(backend: str) -> None:
    """The counters of the warm-up, and those of calls outside the graph, must survive its replays."""
    query, text, router = (torch.randn(n, 64, device="cuda") for n in (3, 40, 6))
    start, end = (torch.tensor(rows, dtype=torch.int32, device="cuda") for rows in ([0, 5, 20], [20, 30, 40]))

    def call() -> torch.Tensor:
        return text_guided_routing(query, text, start, end, router, scale=0.1)[0]

    with force_backend(backend):
        wanted = call()
        compiled = torch.compile(call, mode="reduce-overhead")
        for _ in range(4):
            assert torch.equal(compiled().clone(), wanted)
            assert torch.equal(call(), wanted)
