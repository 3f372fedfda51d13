"""Workloads: every contender that runs on a CPU computes what ours does, and floors count what they should."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_suite import bench, correctness, profile
from benchmarks.measure import H200_BYTES, H200_FLOPS, InputSets, Mismatch, check, contender_of, measure, pass_runs
from benchmarks.timing import time_runs
from benchmarks.workload import Contender, Unavailable, Workload, difference, tolerance
from parrot_sys.ops import registry, swiglu

CPU = bench.workloads("cpu")
# What computes on a CPU; the others say on a GPU machine whether they are there.
ON_CPU = {
    *("cpu", "reference", "auto", "torch", "naive_loop", "released_loop", "cublas_loop", "cublas_bound", "grouped_mm"),
    *("batched", "matrix", "sdpa_flash", "sdpa_batched", "sdpa_dense_mask", "full_logits"),
}
PAIRS = [
    (workload, name)
    for workload in CPU.values()
    for name in (*workload.our_contenders("cpu"), *workload.peers)
    if name in ON_CPU
]


@pytest.mark.parametrize(("workload", "name"), PAIRS, ids=lambda value: getattr(value, "id", value))
def test_contender_computes_what_ours_does(workload: Workload, name: str) -> None:
    inputs = InputSets(workload, "cpu").sets[0]
    try:
        found = check(workload, name, inputs)
    except Unavailable as reason:
        assert f"{workload.op} has no {name} back end" in str(reason)  # noqa: PT017 (some ops have no C++ loops)
        return
    contender = contender_of(workload, name)
    gradients = {f"grad_{leaf}" for leaf in workload.leaves} if contender.checked == "all" else set()
    if contender.checked != "nothing":
        assert set(found) > gradients
    passes = pass_runs(workload, contender, inputs)
    assert set(passes) == set(workload.costs)
    for run in passes.values():
        run()


def test_every_op_is_proven_and_measured() -> None:
    ops = set(registry.OPS)
    assert {case.op for case in correctness.CASES.values()} == ops
    for device in ("cpu", "cuda"):
        assert {workload.op for workload in bench.workloads(device).values()} > ops, device


def test_names_are_unique_and_profiled_kernels_exist() -> None:
    for rows in (correctness.rows("cuda"), bench.rows("cuda"), profile.rows("cuda")):
        assert len(rows) == len(set(rows))
    assert set(profile.MAIN) <= bench.workloads("cuda").keys()
    listed = sum(len(module.workloads("cuda")) for module in bench.MODULES)
    assert len(bench.workloads("cuda")) == listed + 2, "two workloads share a name"


def test_shapes_of_the_plan_are_there() -> None:
    names = bench.workloads("cuda").keys()
    for model in ("parrot_7b", "parrot_14b"):
        for batch in (1, 4, 16, 64):
            for form in ("dense", "top2", "top1"):
                assert f"expert_mlp/{model}_b{batch}_{form}" in names
    for tokens in (
        "qwen3_30b_a3b",
        "deepseek_v3_ep8",
        "d4096_n2048_e64_k4",
        "d4096_n1024_e64_k4",
        "d1536_n256_e128_k8",
    ):
        assert f"token_experts/{tokens}" in names
        assert f"grouped_gemm/{tokens}_up" in names


def test_floors_of_parrot_7b() -> None:
    """From the products alone: 6 M H E I operations forward and twice that backward, at 790 TFLOP/s."""
    workload = bench.workloads("cuda")["expert_mlp/parrot_7b_b4_dense"]
    seconds = {which: cost.floor_seconds(H200_FLOPS, H200_BYTES) for which, cost in workload.costs.items()}
    assert seconds["fwd"] == pytest.approx(6 * 4 * 577 * 4096 * 6 * 4096 / 790e12)
    assert seconds["bwd"] == pytest.approx(2 * seconds["fwd"])
    # 128 text rows of each of 4 images, read once.
    routing = bench.workloads("cuda")["text_guided_routing/parrot_7b_b4_q128"].costs["fwd"]
    assert routing.floor_seconds(H200_FLOPS, H200_BYTES) == pytest.approx(2 * 4096 * (4 * 128 + 4 + 6) / 4.3e12)


def test_difference_counts_one_wrong_row_in_full() -> None:
    wanted = torch.randn(1000, 16)
    own = wanted.clone()
    own[7] = -own[7]
    assert difference(own, wanted) > 0.5
    own[7] = float("nan")
    assert difference(own, wanted) == float("inf")
    assert difference(wanted, wanted) == 0
    assert difference(wanted[:5], wanted) == float("inf")
    limit = torch.tensor([1.0, float("-inf")])
    assert difference(limit, limit) == 0
    assert difference(torch.empty(0, 3), torch.empty(0, 3)) == 0


def test_tolerance_passes_rounding_and_no_more() -> None:
    wanted = torch.randn(64, 256)
    bound = tolerance(torch.bfloat16, 256, roundings=4)
    assert 0 < difference(wanted.bfloat16(), wanted) < bound < 0.05


def _swiglu_workload(**peers: Contender) -> Workload:
    given = CPU["swiglu/cpu"]
    return Workload(**{**{name: getattr(given, name) for name in given.__dataclass_fields__}, "peers": peers})


def test_a_peer_that_computes_something_else_is_a_mismatch() -> None:
    workload = _swiglu_workload(other=Contender(build=lambda inputs: lambda: (1.01 * swiglu(*inputs.values()),)))
    with pytest.raises(Mismatch, match=r"differs from ours by .*output_0"):
        measure(workload, "other", "cpu", seconds=0.0)


def test_a_peer_that_raises_is_not_available() -> None:
    def build(inputs: object) -> None:
        raise RuntimeError("no kernel image")

    workload = _swiglu_workload(broken=Contender(build=build))
    with pytest.raises(Unavailable, match="RuntimeError: no kernel image"):
        measure(workload, "broken", "cpu", seconds=0.0)


def test_measurement_has_every_number() -> None:
    measured = measure(CPU["swiglu/cpu"], "torch", "cpu", seconds=0.0)
    assert set(measured["passes"]) == {"fwd", "bwd"}
    for which, times in measured["passes"].items():
        cost = CPU["swiglu/cpu"].costs[which]
        assert times["min_ms"] <= times["p10_ms"] <= times["ms"] <= times["p90_ms"]
        assert times["tflops"] == pytest.approx(cost.flops / times["ms"] / 1e9)
        assert times["gbytes_s"] == pytest.approx(cost.bytes / times["ms"] / 1e6)
        assert times["input_sets"] == 3
    rows, width = CPU["swiglu/cpu"].sizes.values()
    assert measured["saved_mb"] >= rows * width * 4 / 1e6, "silu(gate) at least, for the gradient of up"


def test_input_sets_take_turns() -> None:
    calls: list[str] = []
    times = time_runs([lambda: calls.append("a"), lambda: calls.append("b")], "cpu", seconds=0.0)
    assert calls == ["a", "b", "a", "b", "a", "b", "a"]  # one round of warming up, then five
    assert times["rounds"] == 5
    assert times["input_sets"] == 2
