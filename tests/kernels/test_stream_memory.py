"""Counters and scratch outlive a call: they are kept by stream, and never come from the memory of a CUDA graph."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest
import torch

from parrot_kernels import semaphores as module
from parrot_kernels import stream_memory
from parrot_kernels.semaphores import semaphores
from parrot_kernels.stream_memory import scratch_of
from parrot_sys.ops import expert_mlp, force_backend, text_guided_routing

CUDA = torch.device("cuda", 0)


class PlayedStream:
    """A stream of the device that is played: knows which streams it waits for."""

    def __init__(self, number: int) -> None:
        self.cuda_stream = number
        self.awaited: list[PlayedStream] = []

    def wait_stream(self, other: PlayedStream) -> None:
        self.awaited.append(other)


class PlayedDevice:
    """The parts of torch.cuda that the memory sees; allocations of a captured thread or stream go to the pool."""

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

    def allocate(self, count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        made = torch.full((count,), 0, dtype=dtype)
        in_pool = self.current_stream(device) is self.main or threading.get_ident() == self.pooled_thread
        if self.pooled_thread is not None and in_pool:
            self.pool.append(made)
        return made


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> PlayedDevice:
    device = PlayedDevice()
    monkeypatch.setattr(module, "_semaphores", {})
    monkeypatch.setattr(stream_memory, "_scratch", {})
    monkeypatch.setattr(torch, "zeros", device.allocate)
    monkeypatch.setattr(torch, "empty", device.allocate)
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


def test_scratch_is_kept_for_each_stream(played: PlayedDevice) -> None:
    first = scratch_of(1000, CUDA, 7)
    assert first.numel() >= 1000
    assert scratch_of(5000, CUDA, 7) is first
    assert scratch_of(1000, CUDA, 8) is not first
    assert scratch_of(1000, torch.device("cuda", 1), 7) is not first
    many = stream_memory._SCRATCH_BYTES + 1
    assert scratch_of(many, CUDA, 7).numel() == many
    assert scratch_of(many, CUDA, 7) is not scratch_of(many, CUDA, 7)
    assert scratch_of(1000, CUDA, 7) is first


def test_scratch_of_a_graph_is_its_own(played: PlayedDevice) -> None:
    """Its replays may run at the same time as other launches on the stream that captured it."""
    played.pooled_thread = threading.get_ident()
    kept = scratch_of(1000, CUDA, 7)
    assert not played.pool
    assert len(played.main.awaited) == 1
    played.capturing = True
    captured = scratch_of(1000, CUDA, 7)
    assert captured is not kept
    assert played.pool == [captured]
    played.capturing, played.pooled_thread = False, None
    assert scratch_of(1000, CUDA, 7) is kept


@pytest.mark.gpu
def test_replays_beside_other_launches() -> None:
    """A graph of products by TMA on one stream, the same launches on the stream that captured it at the same time."""
    x, gate_up = torch.randn(2, 128, 256, device="cuda"), torch.randn(3, 2, 128, 256, device="cuda")
    down, probs = torch.randn(3, 128, 256, device="cuda"), torch.rand(2, 3, device="cuda")
    x, gate_up, down = x.bfloat16(), gate_up.bfloat16(), down.bfloat16()
    captured_on, replayed_on = torch.cuda.Stream(), torch.cuda.Stream()
    with force_backend("triton"), torch.cuda.stream(captured_on):
        wanted = expert_mlp(x, gate_up, down, probs)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=captured_on):
            replayed = expert_mlp(x, gate_up, down, probs)
        others = []
        for _ in range(50):
            with torch.cuda.stream(replayed_on):
                graph.replay()
            others.append(expert_mlp(2 * x, gate_up, down, probs))
        torch.cuda.synchronize()
        assert torch.equal(replayed, wanted)
        assert all(torch.equal(other, others[0]) for other in others)


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
