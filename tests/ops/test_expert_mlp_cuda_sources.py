"""The CUDA experts: on a GPU if there is one, else their sources compiled for the CPU (tests/cuda_emulator).

Values and gradients against a loop over images and experts in float64. Clusters of two blocks compute pairs of tiles of
128 rows by 256 columns, in the backward pass of SwiGLU by 128; 64 steps of the reduction are a stage.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parrot_kernels.expert_mlp import cuda_impl
from parrot_kernels.testing import MoEShape, assert_all_accurate, make_expert_inputs, outputs_and_gradients
from parrot_sys.ops import ExpertPlan, TopKRouting, expert_mlp, topk_routing
from tests import cuda_emulator
from tests.ops.expert_expression import expression, launchers

RESIDUAL, OUTPUT = 0.3, 1.7

CASES = {
    "width_40": MoEShape(images=2, rows=66, hidden=16, experts=3, ffn=40, topk=2),  # a block of rows with two rows
    # An odd number of row blocks and of columns: tiles that lie outside. An expert of more than one step.
    "odd": MoEShape(images=1, rows=130, hidden=520, experts=2, ffn=72, topk=2),
    "wide": MoEShape(images=1, rows=64, hidden=264, experts=2, ffn=136, topk=1),  # two tiles of units
    "empty_experts": MoEShape(images=1, rows=65, hidden=8, experts=6, ffn=8, topk=2),
    "no_image": MoEShape(images=0, rows=64, hidden=8, experts=3, ffn=8, topk=2),
}
RUNS = [
    *((case, sparse, torch.bfloat16) for case in CASES for sparse in (False, True)),
    ("width_40", False, torch.float16),
    ("width_40", True, torch.float16),
]
RUN_IDS = [
    f"{case}-{'topk' if sparse else 'dense'}-{str(dtype).removeprefix('torch.')}" for case, sparse, dtype in RUNS
]


def make_inputs(shape: MoEShape, sparse: bool, device: torch.device) -> tuple[dict[str, Tensor], TopKRouting | None]:
    inputs = make_expert_inputs(shape)
    logits = inputs.pop("logits")
    inputs["probs"] = logits.softmax(-1)
    route = topk_routing(logits, shape.topk, renormalize=False) if sparse else None
    return inputs, None if route is None else TopKRouting(*(tensor.to(device) for tensor in route))


def run(leaves: dict[str, Tensor], route: TopKRouting | ExpertPlan | None, device: torch.device, **options) -> Tensor:
    x, w_gate_up, w_down, probs = (leaf.to(device) for leaf in leaves.values())
    return expert_mlp(
        x, w_gate_up, w_down, probs.float(), plan=route, residual_scale=RESIDUAL, output_scale=OUTPUT, **options
    ).cpu()


@pytest.mark.parametrize("multiprocessors", [2, 6])  # six are three clusters: a reduction of the last wave is split
@pytest.mark.parametrize(("case", "sparse", "dtype"), RUNS, ids=RUN_IDS)
def test_matches_float64(
    ran_on, cuda_device, case: str, sparse: bool, dtype: torch.dtype, multiprocessors: int
) -> None:
    inputs, route = make_inputs(CASES[case], sparse, cuda_device)
    inputs = {name: value.to(dtype).double() for name, value in inputs.items()}

    def plain(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        chosen = 1 if route is None else (route.probs > 0).cpu()
        return {"y": expression(leaves, leaves["probs"] * chosen, RESIDUAL, OUTPUT)}

    with ran_on("cuda", "expert_mlp", *launchers(sparse)), cuda_emulator.device(multiprocessors=multiprocessors):
        actual = outputs_and_gradients(lambda leaves: {"y": run(leaves, route, cuda_device)}, inputs, dtype)
    assert actual["y"].dtype == dtype
    exact = outputs_and_gradients(plain, inputs, torch.float64)
    assert_all_accurate(actual, exact, outputs_and_gradients(plain, inputs, dtype))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "topk"])
def test_neither_order_of_threads_nor_recomputation_changes_a_bit(ran_on, cuda_device, sparse: bool) -> None:
    """On a GPU two runs must agree; the emulator also shuffles its threads and blocks and delays copies."""
    inputs, route = make_inputs(CASES["odd"], sparse, cuda_device)
    results = []
    for seed in (0, 1):
        with ran_on("cuda", "expert_mlp", *launchers(sparse)), cuda_emulator.device(seed=seed, multiprocessors=6):
            results.append(
                outputs_and_gradients(
                    lambda leaves, again=bool(seed): {"y": run(leaves, route, cuda_device, recompute=again)},
                    inputs,
                    torch.bfloat16,
                )
            )
    for name, first in results[0].items():
        assert torch.equal(first, results[1][name]), name


def test_images_without_some_of_their_experts(ran_on, cuda_device) -> None:
    """A plan with fewer positions than choices, as a rank of expert parallelism has; one image has none."""
    shape = MoEShape(images=3, rows=64, hidden=16, experts=2, ffn=8, topk=2)
    inputs, _ = make_inputs(shape, False, cuda_device)
    kept = torch.tensor([[1, 0], [0, 0], [1, 1]])  # image by expert
    indices = torch.tensor([[0, 1], [0, 1], [1, 0]])
    plan, offsets = torch.tensor([0, 5, 4]), torch.tensor([0, 2, 3], dtype=torch.int32)
    route = ExpertPlan(*(tensor.to(cuda_device) for tensor in (indices, offsets, plan)))
    with ran_on("cuda", "expert_mlp", *launchers(sparse=True)):
        actual = outputs_and_gradients(lambda leaves: {"y": run(leaves, route, cuda_device)}, inputs, torch.bfloat16)
    plain = [
        outputs_and_gradients(
            lambda leaves: {"y": expression(leaves, leaves["probs"] * kept, RESIDUAL, OUTPUT)}, inputs, dtype
        )
        for dtype in (torch.float64, torch.bfloat16)
    ]
    assert_all_accurate(actual, *plain)


def test_reasons_for_a_refusal(cuda_device: torch.device) -> None:
    def reason(rows: int = 64, hidden: int = 16, ffn: int = 8, chosen: bool = False) -> str | None:
        def empty(*sizes: int) -> Tensor:
            return torch.empty(*sizes, dtype=torch.bfloat16, device=cuda_device)

        args = (empty(2, rows, hidden), empty(3, 2, ffn, hidden), empty(3, ffn, hidden), torch.empty(2, 3))
        route = (torch.zeros(2, 2), torch.zeros(4), torch.zeros(4)) if chosen else ()
        return cuda_impl.why_not(*args, *route)

    assert reason() is None
    assert reason(rows=1) is None
    assert reason(chosen=True) is None
    assert reason(rows=63, chosen=True) == "it takes chosen images of at least 64 rows, got 63"
    assert reason(hidden=12) == "each width must be a multiple of 8 for bfloat16, got 12"
    assert reason(ffn=12) == "each width must be a multiple of 8 for bfloat16, got 12"


def test_host_checks_name_what_is_wrong(cuda_device: torch.device) -> None:
    ops = torch.ops.parrot_ext
    a, w, residual = (
        torch.zeros(s, dtype=torch.bfloat16, device=cuda_device) for s in ((2, 3, 8), (2, 8, 16), (1, 3, 16))
    )
    arrived = torch.zeros(1024, dtype=torch.int32, device=cuda_device)
    with pytest.raises(RuntimeError, match=r"residual must have shape \[any, 3, 16\], got \[1, 3, 8\]"):
        ops.expert_combine_cuda(a, w, None, None, residual[..., :8].contiguous(), arrived, 1.0)
    with pytest.raises(RuntimeError, match="a must have 4 segments, got 2"):
        ops.expert_combine_cuda(a, w, None, None, residual.expand(2, 3, 16).contiguous(), arrived, 1.0)
    z, weights = torch.zeros(2, 3, 2, 8, dtype=torch.bfloat16, device=cuda_device), torch.zeros(2, device=cuda_device)
    with pytest.raises(RuntimeError, match=r"weights must have dtype Float, got BFloat16"):
        ops.expert_hidden_bwd_cuda(residual, w, z, weights.bfloat16(), None, None, 1)
    with pytest.raises(RuntimeError, match="a plan needs offsets"):
        ops.m_grouped_swiglu_cuda(residual, w.view(1, 2, 8, 16), None, torch.zeros(1, dtype=torch.int64), 1, None, True)
