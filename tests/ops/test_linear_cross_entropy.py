"""linear_cross_entropy: losses and gradients against F.cross_entropy over the full logits in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parrot_kernels.linear_cross_entropy import reference
from parrot_kernels.testing import assert_all_accurate, outputs_and_gradients
from parrot_sys.ops import linear_cross_entropy, linear_cross_entropy_parts

LAUNCHERS = ("linear_cross_entropy_fwd", "linear_cross_entropy_bwd")

# rows, hidden, vocabulary
CASES = {
    "one_block": (7, 16, 50),
    "blocks": (5, 8, 97),  # MIN_BLOCK is 32 in these tests: four blocks, the last one short
    "exact_blocks": (3, 8, 64),
    "one_row": (1, 8, 97),
    "no_row": (0, 8, 97),
    "one_word": (4, 8, 1),
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "BLOCK_BYTES", 1)
    monkeypatch.setattr(reference, "MIN_BLOCK", 32)


def make_inputs(rows: int, hidden: int, vocabulary: int) -> tuple[dict[str, Tensor], Tensor]:
    inputs = {
        "hidden": torch.randn(rows, hidden, dtype=torch.float64),
        "weight": torch.randn(vocabulary, hidden, dtype=torch.float64) * hidden**-0.5,
    }
    return inputs, torch.randint(vocabulary, (rows,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(ran_on, case: str, dtype: torch.dtype) -> None:
    inputs, targets = make_inputs(*CASES[case])
    inputs = {name: value.to(dtype).double() for name, value in inputs.items()}

    def op(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": linear_cross_entropy(leaves["hidden"], leaves["weight"], targets)}

    def plain(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(leaves["hidden"] @ leaves["weight"].T, targets, reduction="none")}

    with ran_on("reference", "linear_cross_entropy", *LAUNCHERS):
        actual = outputs_and_gradients(op, inputs, dtype)
    assert actual["loss"].dtype == torch.float32
    exact = outputs_and_gradients(plain, inputs, torch.float64)
    assert_all_accurate(actual, exact, outputs_and_gradients(plain, inputs, dtype))


def test_slices_of_the_vocabulary_combine() -> None:
    inputs, targets = make_inputs(6, 8, 90)
    hidden, weight = inputs["hidden"], inputs["weight"]
    parts = [
        linear_cross_entropy_parts(hidden, weight[start : start + 30], targets, vocab_start=start)
        for start in (0, 30, 60)
    ]
    lse = torch.stack([part[0] for part in parts]).logsumexp(0)
    target_logits = torch.stack([part[1] for part in parts])
    # Each target belongs to one slice, the others give an exact zero.
    assert torch.equal((target_logits != 0).sum(0), torch.ones(6, dtype=torch.int64))
    wanted = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
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


def test_gradcheck() -> None:
    inputs, targets = make_inputs(3, 4, 70)
    hidden, weight = (value.requires_grad_() for value in inputs.values())
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy_parts(h, w, targets, vocab_start=-10), (hidden, weight)
    )


@pytest.mark.parametrize("rows", [3, 0])
def test_opcheck(rows: int) -> None:
    inputs, targets = make_inputs(rows, 4, 70)
    hidden, weight = (value.float().requires_grad_() for value in inputs.values())
    torch.library.opcheck(torch.ops.parrot.linear_cross_entropy.default, (hidden, weight, targets, 0))
