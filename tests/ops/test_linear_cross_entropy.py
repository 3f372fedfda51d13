"""linear_cross_entropy: losses and gradients against F.cross_entropy over the full logits in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from parrot_kernels.linear_cross_entropy import reference, triton_impl
from parrot_kernels.testing import assert_all_accurate, outputs_and_gradients
from parrot_sys.ops import linear_cross_entropy, linear_cross_entropy_parts

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAUNCHERS = ("linear_cross_entropy_fwd", "linear_cross_entropy_bwd")

# rows, hidden, vocabulary
CASES = {
    "one_block": (7, 16, 50),
    "blocks": (5, 8, 97),  # MIN_BLOCK is 32 in these tests: four blocks, the last one short
    "exact_blocks": (3, 8, 64),
    "one_row": (1, 8, 97),
    "no_row": (0, 8, 97),
    "one_word": (4, 8, 1),
    "primes": (37, 67, 101),  # in Triton's interpreter tiles are 16 x 32 x 32, and rows that no TMA reads
    "aligned": (37, 72, 101),
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "BLOCK_BYTES", 1)
    monkeypatch.setattr(reference, "MIN_BLOCK", 32)
    monkeypatch.setattr(triton_impl, "CHUNK_BYTES", 1)
    monkeypatch.setattr(triton_impl, "MIN_CHUNK", 32)


def make_inputs(rows: int, hidden: int, vocabulary: int) -> tuple[dict[str, Tensor], Tensor]:
    inputs = {
        "hidden": torch.randn(rows, hidden, dtype=torch.float64),
        "weight": torch.randn(vocabulary, hidden, dtype=torch.float64) * hidden**-0.5,
    }
    return inputs, torch.randint(vocabulary, (rows,))


def plain(leaves: dict[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
    return {"loss": F.cross_entropy(leaves["hidden"] @ leaves["weight"].T, targets, reduction="none")}


def check(inputs: dict[str, Tensor], targets: Tensor, dtype: torch.dtype, device: torch.device | str) -> None:
    inputs = {name: value.to(dtype).double() for name, value in inputs.items()}

    def op(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": linear_cross_entropy(leaves["hidden"], leaves["weight"], targets.to(device)).cpu()}

    actual = outputs_and_gradients(op, {name: value.to(device) for name, value in inputs.items()}, dtype)
    assert actual["loss"].dtype == torch.float32
    exact, same_dtype = (
        outputs_and_gradients(lambda own: plain(own, targets), inputs, d) for d in (torch.float64, dtype)
    )
    assert_all_accurate({name: value.cpu() for name, value in actual.items()}, exact, same_dtype)


def runs(backend: str, dtype: str, case: str) -> bool:
    """The interpreter is slow: one dtype has all cases."""
    return backend != "triton" or dtype == "bf16" or case in ("blocks", "primes")


@pytest.mark.parametrize(
    ("backend", "dtype", "case"),
    [
        pytest.param(backend, dtype, case, id=f"{backend}-{dtype}-{case}")
        for backend in ("reference", "triton")
        for dtype in DTYPES
        for case in CASES
        if runs(backend, dtype, case)
    ],
)
def test_matches_float64(ran_on, device_of, backend: str, dtype: str, case: str) -> None:
    inputs, targets = make_inputs(*CASES[case])
    with ran_on(backend, "linear_cross_entropy", *LAUNCHERS):
        check(inputs, targets, DTYPES[dtype], device_of(backend))


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 40), hidden=st.integers(1, 70), vocabulary=st.integers(1, 100))
def test_ragged_sizes_on_triton(ran_on, triton_device: torch.device, rows: int, hidden: int, vocabulary: int) -> None:
    inputs, targets = make_inputs(rows, hidden, vocabulary)
    with ran_on("triton", "linear_cross_entropy", *LAUNCHERS):
        check(inputs, targets, torch.bfloat16, triton_device)


@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_ignored_rows(ignore_index: int) -> None:
    inputs, targets = make_inputs(6, 8, 90)
    targets[1], targets[4] = ignore_index, ignore_index
    leaves, full = ({name: value.clone().requires_grad_() for name, value in inputs.items()} for _ in range(2))
    losses = linear_cross_entropy(**leaves, targets=targets, ignore_index=ignore_index)
    logits = full["hidden"] @ full["weight"].T
    wanted = F.cross_entropy(logits, targets, reduction="none", ignore_index=ignore_index)
    torch.testing.assert_close(losses, wanted)
    assert losses[[1, 4]].tolist() == [0.0, 0.0]
    grad = torch.randn(6, dtype=torch.float64)
    losses.backward(grad)
    wanted.backward(grad)
    assert not leaves["hidden"].grad[[1, 4]].any()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, full[name].grad)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_slices_of_the_vocabulary_combine(ran_on, device_of, backend: str) -> None:
    device = device_of(backend)
    inputs, targets = make_inputs(6, 8, 90)
    hidden, weight = (value.float().to(device) for value in inputs.values())
    with ran_on(backend, "linear_cross_entropy", "linear_cross_entropy_fwd"):
        parts = [
            linear_cross_entropy_parts(hidden, weight[start : start + 30], targets.to(device), vocab_start=start)
            for start in (0, 30, 60)
        ]
    parts = [tuple(value.cpu() for value in part) for part in parts]
    lse = torch.stack([part[0] for part in parts]).logsumexp(0)
    target_logits = torch.stack([part[1] for part in parts])
    # Each target belongs to one slice, the others give an exact zero.
    assert torch.equal((target_logits != 0).sum(0), torch.ones(6, dtype=torch.int64))
    wanted = F.cross_entropy(hidden.cpu() @ weight.cpu().T, targets, reduction="none")
    torch.testing.assert_close(lse - target_logits.sum(0), wanted)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_inputs_get_no_gradient(frozen: str) -> None:
    inputs, targets = make_inputs(6, 8, 90)
    leaves = {name: value.requires_grad_(name != frozen) for name, value in inputs.items()}
    full = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    linear_cross_entropy(leaves["hidden"], leaves["weight"], targets).sum().backward()
    linear_cross_entropy(full["hidden"], full["weight"], targets).sum().backward()
    assert leaves.pop(frozen).grad is None
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, full[name].grad)


def test_no_tensor_of_full_logits_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product and elementwise result in both passes stays within one block of columns."""
    monkeypatch.setattr(reference, "MIN_BLOCK", 100)
    rows, vocabulary = 64, 1000
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.shape[0] == rows:
                    largest = max(largest, tensor.numel())
            return out

    inputs, targets = make_inputs(rows, 8, vocabulary)
    hidden, weight = (value.requires_grad_() for value in inputs.values())
    with Watch():
        lse, _ = reference.linear_cross_entropy_fwd(hidden.detach(), weight.detach(), targets, 0)
        ones = torch.ones_like(lse)
        reference.linear_cross_entropy_bwd(ones, -ones, hidden.detach(), weight.detach(), targets, lse, 0, (True, True))
    assert largest == rows * 100


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_triton_computes_only_what_is_needed(triton_device: torch.device, needs: tuple[bool, bool]) -> None:
    inputs, targets = make_inputs(6, 8, 90)
    args = [*(value.float().to(triton_device) for value in inputs.values()), targets.to(triton_device)]
    lse, target_logits = triton_impl.linear_cross_entropy_fwd(*args, 0)
    grads = torch.randn_like(lse), torch.randn_like(target_logits)
    full = triton_impl.linear_cross_entropy_bwd(*grads, *args, lse, 0, (True, True))
    some = triton_impl.linear_cross_entropy_bwd(*grads, *args, lse, 0, needs)
    for wanted, own, all_of_it in zip(needs, some, full, strict=True):
        assert torch.equal(own, all_of_it) if wanted else own.shape == (0,)


def test_triton_chunks_stay_within_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the sizes of real calls
    rows, vocabulary = 4096, 151936
    chunks = list(triton_impl._chunks(rows, vocabulary, 2))
    assert [start for start, _ in chunks] == [0, *(stop for _, stop in chunks[:-1])]
    assert chunks[-1][1] == vocabulary
    assert max(stop - start for start, stop in chunks) * rows * 2 <= triton_impl.CHUNK_BYTES
    assert list(triton_impl._chunks(10**7, 1500, 2)) == [(0, 1024), (1024, 1500)]


def test_gradcheck() -> None:
    inputs, targets = make_inputs(3, 4, 70)
    hidden, weight = (value.requires_grad_() for value in inputs.values())
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy_parts(h, w, targets, vocab_start=-10), (hidden, weight)
    )
