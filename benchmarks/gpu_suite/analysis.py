"""What a results file says about speed: timings with their floors, and targets that are met or missed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.measure import H200_BYTES, H200_FLOPS
from benchmarks.workload import Cost


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What floors are counted with."""

    flops: float
    bytes: float
    source: str
    """"H200" for the reference that the targets refer to, else "this run"."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One pass of one contender."""

    op: str
    workload: str
    contender: str
    which: str
    ours: bool
    checked: bool
    """Its result was compared with ours (True for ours)."""
    ms: float
    p10_ms: float
    p90_ms: float
    cost: Cost
    floor_ms: float
    saved_mb: float | None
    """Kept for the backward pass; None without one."""
    wanted: Mapping[str, float]

    @property
    def key(self) -> tuple[str, str, str]:
        """Workload, pass, contender."""
        return self.workload, self.which, self.contender

    @property
    def tflops(self) -> float:
        """Achieved TFLOP/s."""
        return self.cost.flops / self.ms / 1e9

    @property
    def gbytes_s(self) -> float:
        """Achieved GB/s."""
        return self.cost.bytes / self.ms / 1e6

    @property
    def share(self) -> float:
        """Of the floor: 1 is as fast as any version can be."""
        return self.floor_ms / self.ms


def rows(content: Mapping[str, Any], stage: str) -> dict[str, dict[str, Any]]:
    """Rows of a stage; none where it was never run."""
    return content["stages"].get(stage, {}).get("rows", {})


def ceilings(content: Mapping[str, Any]) -> Ceilings | None:
    """The H200's reference figures on an H200, elsewhere what this run measured, None where it measured none."""
    if "H200" in str(content["machine"]["device"]):
        return Ceilings(flops=H200_FLOPS, bytes=H200_BYTES, source="H200")
    measured = {name: rows(content, "bench").get(f"ceiling/{name}/torch", {}) for name in ("matmul", "copy")}
    if any(row.get("status") != "passed" for row in measured.values()):
        return None
    passes = {name: row["passes"]["fwd"] for name, row in measured.items()}
    flops, nbytes = 1e12 * passes["matmul"]["tflops"], 1e9 * passes["copy"]["gbytes_s"]
    return Ceilings(flops=flops, bytes=nbytes, source="this run")


def timings(content: Mapping[str, Any]) -> list[Timing]:
    """Every timing of the bench stage, in the order of the file."""
    limits = ceilings(content)
    return [
        timing
        for name, row in rows(content, "bench").items()
        if row["status"] == "passed"
        for timing in _timings(name, row, limits)
    ]


def _timings(name: str, row: Mapping[str, Any], limits: Ceilings | None) -> Iterator[Timing]:
    workload, contender = name.rsplit("/", 1)
    for which, times in row["passes"].items():
        cost = Cost(flops=times["flops"], bytes=times["bytes"])
        yield Timing(
            op=workload.split("/")[0],
            workload=workload,
            contender=contender,
            which=which,
            ours=row["ours"],
            checked=row["ours"] or bool(row["difference"]),
            ms=times["ms"],
            p10_ms=times["p10_ms"],
            p90_ms=times["p90_ms"],
            cost=cost,
            floor_ms=float("nan") if limits is None else 1e3 * cost.floor_seconds(limits.flops, limits.bytes),
            saved_mb=row.get("saved_mb"),
            wanted=row["wanted"].get(which, {}),
        )


def best_peer(timing: Timing, others: list[Timing]) -> Timing | None:
    """The fastest checked peer on the same pass of the same workload."""
    same = (other for other in others if other.workload == timing.workload and other.which == timing.which)
    return min((other for other in same if other.checked and not other.ours), key=lambda t: t.ms, default=None)


def verdicts(timing: Timing, others: list[Timing]) -> dict[str, bool | None]:
    """Whether each target is met, by its text; None where the peer that it names was not measured."""
    found: dict[str, bool | None] = {}
    for key, bound in timing.wanted.items():
        backend, _, measure = key.rpartition(": ")
        if backend not in ("", timing.contender):
            continue
        if measure == "ms":
            found[f"<= {bound:.3g} ms"] = timing.ms <= bound
        elif measure in ("tflops", "share"):
            found[f"{measure} >= {bound:g}"] = getattr(timing, measure) >= bound
        else:
            peer = (
                best_peer(timing, others) if measure == "best" else _named(measure.removeprefix("x "), timing, others)
            )
            name = "best peer" if measure == "best" else measure.removeprefix("x ")
            found[f">= {bound:.2f} x {name}"] = None if peer is None else peer.ms / timing.ms >= bound
    return found


def _named(name: str, timing: Timing, others: list[Timing]) -> Timing | None:
    return next((other for other in others if other.key == (timing.workload, timing.which, name)), None)
