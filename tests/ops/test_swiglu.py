"""swiglu: values and gradients against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parrot_kernels.testing import assert_all_accurate, outputs_and_gradients
from parrot_sys.ops import swiglu

DTYPES = {"reference": (torch.float32, torch.bfloat16, torch.float16), "cpu": (torch.float32, torch.bfloat16)}
DTYPES["triton"] = DTYPES["reference"]
# segments, rows a segment, width
CASES = {"tokens": (7, 1, 40), "images": (2, 5, 13), "wide": (2, 1, 150), "one": (1, 1, 1), "none": (0, 3, 8)}


@pytest.mark.parametrize(("backend", "dtype"), [(name, dtype) for name, dtypes in DTYPES.items() for dtype in dtypes])
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(ran_on, triton_device, case: str, weighted: bool, backend: str, dtype: torch.dtype) -> None:
    segments, rows, width = CASES[case]
    device = triton_device if backend == "triton" else "cpu"
    inputs = {"z": 3 * torch.randn(segments, rows, 2, width).to(device), "weights": torch.randn(segments).to(device)}
    if not weighted:
        inputs.pop("weights")

    def op(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"h": swiglu(leaves["z"], leaves["weights"].to(torch.float32) if weighted else None)}

    def plain(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        gate, up = leaves["z"].unbind(2)
        h = F.silu(gate) * up
        return {"h": h * leaves["weights"][:, None, None] if weighted else h}

    with ran_on(backend, "swiglu", "swiglu_fwd", "swiglu_bwd"):
        actual = outputs_and_gradients(op, inputs, dtype)
    assert actual["h"].dtype == dtype
    inputs = {name: value.to(dtype) for name, value in inputs.items()}
    exact = outputs_and_gradients(plain, inputs, torch.float64)
    assert_all_accurate(actual, exact, outputs_and_gradients(plain, inputs, dtype))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's, in the interpreter
@pytest.mark.parametrize("backend", DTYPES)
def test_far_gates_give_the_limits(ran_on, triton_device, backend: str) -> None:
    """Where exp overflows: silu is the identity on one side and zero on the other, and so are its slopes."""
    device = triton_device if backend == "triton" else "cpu"
    z = torch.tensor([[[-200.0, 200.0], [1.0, 1.0]]], device=device, requires_grad=True)
    with ran_on(backend, "swiglu", "swiglu_fwd", "swiglu_bwd"):
        h = swiglu(z)
        h.sum().backward()
    assert z.grad is not None
    torch.testing.assert_close(h.detach(), torch.tensor([[0.0, 200.0]], device=device))
    torch.testing.assert_close(z.grad, torch.tensor([[[0.0, 1.0], [0.0, 200.0]]], device=device))


def test_gradcheck() -> None:
    z, weights = torch.randn(3, 2, 2, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    assert torch.autograd.gradcheck(swiglu, (z.requires_grad_(), weights.requires_grad_()))


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"z must be \[J, 2, I\] or \[J, V, 2, I\], got \[3, 4\]"):
        swiglu(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"weights must be \[3\], got \[2\]"):
        swiglu(torch.zeros(3, 2, 4), torch.zeros(2))
