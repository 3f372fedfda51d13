"""Workload of a benchmark: one op at one shape, computed by our back ends and by peers, with its least work.

Each `bench_<op>.py` lists workloads for a device ("cpu" or "cuda"); pytest-benchmark, its own command line and
`benchmarks.gpu_suite` run the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from parrot_sys.ops import force_backend, topk_routing

Inputs = dict[str, Tensor]
Run = Callable[[], tuple[Tensor, ...]]
Grads = Sequence[Tensor | None]
Pass = Literal["fwd", "bwd", "fwd_bwd"]


class Unavailable(Exception):
    """A peer, tool or back end cannot run here; the message says why."""


class Broke(Unavailable):
    """A peer raised while it ran: after an error on a GPU its process may be of no use any more."""


def _same(tensors: Any) -> Any:
    return tensors


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Functions that are timed, for a contender whose results or parameters are laid out in its own way."""

    run: Run
    leaves: Sequence[Tensor] = ()
    """Its parameters and inputs with gradients."""
    merge: Callable[[Grads], Grads] = _same
    """Gradients of `leaves` -> gradients of the workload's leaves; only to compare them."""
    outputs: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = _same
    """Results of `run` -> results like ours; only to compare them."""


Build = Callable[[Inputs], Run | Prepared]
"""Takes inputs, prepares what is not timed (layouts, padding, plans), and gives the function that is."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The least work of one pass: operations, and bytes when each input is read and each output written once."""

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(flops=self.flops + other.flops, bytes=self.bytes + other.bytes)

    def floor_seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """No version is faster on a machine with these ceilings."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to compute a workload."""

    build: Build
    backward: bool = True
    """False: it has a forward pass only."""
    checked: Literal["all", "outputs", "nothing"] = "all"
    """Must equal ours: outputs and gradients, outputs, or nothing for a bound that leaves out part of the work."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One op at one shape."""

    op: str
    name: str
    sizes: Mapping[str, int]
    weights: Callable[[Maker], Inputs]
    """Inputs that all input sets share."""
    data: Callable[[Maker], Inputs]
    """Inputs that each input set has of its own."""
    ours: Build
    peers: Mapping[str, Contender]
    costs: Mapping[Pass, Cost]
    leaves: tuple[str, ...] = ()
    """Inputs that get gradients."""
    terms: int
    """Number of terms in the longest sum; with the dtype it gives the tolerance."""
    roundings: int = 4
    """How often a contender may round to the dtype on the way: pre-activation, activation, weighting, sum. A score
    before a softmax counts four times, since rounding one of size 4 changes its weight so much more."""
    backends: tuple[str, ...] | None = None
    """Our contenders: names of back ends, or ("auto",) for what consists of several ops; None for all."""
    wanted: Mapping[Pass, Mapping[str, float]] = field(default_factory=dict)
    """Targets on an H200: `ms` at most; at least `tflops`, `share` of the floor, `best` (times as fast as the fastest
    checked peer), `x NAME` (times as fast as that peer). `cuda: ` before one makes it that back end's alone."""

    @property
    def id(self) -> str:
        """Unique name."""
        return f"{self.op}/{self.name}"

    def prepare(self, contender: Contender, inputs: Inputs) -> Prepared:
        """The contender's function and leaves on these inputs."""
        built = contender.build(inputs)
        if isinstance(built, Prepared):
            return built
        return Prepared(run=built, leaves=[inputs[name] for name in self.leaves])

    def our_contenders(self, device: str) -> tuple[str, ...]:
        """Compiled back ends of a GPU; on a CPU its own, which is the reference where there is no other."""
        if self.backends is not None:
            return self.backends
        return ("triton", "cuda") if device == "cuda" else ("cpu", "reference")


@dataclass(frozen=True, kw_only=True)
class Maker:
    """Makes random tensors of one device, dtype and seed."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    @classmethod
    def seeded(cls, device: str, seed: int) -> Maker:
        """bfloat16 on a GPU; float32 on a CPU, most of which have no fast bfloat16 products."""
        generator = torch.Generator(device).manual_seed(seed)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        return cls(device=torch.device(device), dtype=dtype, generator=generator)

    def normal(self, *sizes: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal deviates times `scale`, in the maker's dtype unless told otherwise."""
        values = torch.randn(sizes, device=self.device, dtype=dtype or self.dtype, generator=self.generator)
        return values.mul_(scale)

    def probabilities(self, *sizes: int) -> Tensor:
        """Softmax over the last dimension, float32."""
        return self.normal(*sizes, dtype=torch.float32).softmax(-1)

    def integers(self, high: int, *sizes: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Uniform in [0, high)."""
        return torch.randint(high, sizes, device=self.device, dtype=dtype, generator=self.generator)

    def route(self, rows: int, experts: int, topk: int) -> Inputs:
        """The fields of TopKRouting for random logits, from the reference: inputs must not depend on what is tested."""
        with force_backend("reference"):
            logits = self.normal(rows, experts, dtype=torch.float32)
            return topk_routing(logits, topk, renormalize=True)._asdict()


def itemsize(device: str) -> int:
    """Bytes of one number of `Maker.seeded`'s dtype."""
    return 4 if device == "cpu" else 2


def tolerance(dtype: torch.dtype, terms: int, roundings: int) -> float:
    """Largest `difference` of two right results.

    Each rounds to `dtype` at most `roundings` times between input and output, and sums `terms` numbers in float32 in an
    order of its own, whose errors grow like the root of their number.
    """
    return roundings * torch.finfo(dtype).eps + 4 * terms**0.5 * torch.finfo(torch.float32).eps


def difference(own: Tensor, wanted: Tensor) -> float:
    """Largest distance of two rows (last dimension) over the largest norm of a row of `wanted`.

    By rows, so that one wrong row among thousands counts in full; NaN counts as infinite.
    """
    if own.shape != wanted.shape:
        return float("inf")
    if not own.numel():
        return 0.0
    width = own.shape[-1] if own.dim() > 1 else 1
    distance = scale = 0.0
    # In slices, since float32 copies of a large model's weight gradients would not fit beside them.
    for a, b in zip(_slices(own, width), _slices(wanted, width), strict=True):
        gap = (a - b).masked_fill(a == b, 0.0).norm(dim=-1)  # equal infinities have the difference NaN
        distance = max(distance, float(gap.nan_to_num(nan=float("inf")).max()))
        scale = max(scale, float(b.norm(dim=-1).nan_to_num(nan=0.0, posinf=0.0).max()))
    return distance / scale if scale else distance


def _slices(tensor: Tensor, width: int) -> Iterator[Tensor]:
    return (part.float() for part in tensor.detach().reshape(-1, width).split(max(1, 2**26 // width)))
