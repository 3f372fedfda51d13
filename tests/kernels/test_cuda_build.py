"""The compiled CUDA kernels, read back from the extension: spills, stack, tensor-core and copy-engine instructions."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import parrot_kernels
from parrot_kernels import _extension

# A build without nvcc, or with PARROT_CUDA=0, has no CUDA kernels, and says so; one that does not load is a failure.
WITHOUT_CUDA = _extension.why_not_cuda() if _extension.why_not() is None else None
pytestmark = pytest.mark.skipif(WITHOUT_CUDA is not None, reason=str(WITHOUT_CUDA))

# Matrix products, and the boxes of 64 columns that a warp group stores of a tile.
PRODUCTS = ("MProduct", "KProduct", "CombineProduct", "HiddenBackwardProduct")
# The last two arguments of MProduct say whether it gathers rows, and whether its operands are scaled float8.
STORES = {
    "MProduct.*WeightsE[01].*GemmShapeILi256.*Lb0ELb0E": 4,
    "MProduct.*WeightsE[01].*GemmShapeILi256.*Lb1ELb0E": 4,
    "MProduct.*WeightsE[01].*GemmShapeILi192": 2 * 3,
    "MProduct.*WeightsE0.*GemmShapeILi128.*Lb0ELb1E": 2,
    "MProduct.*WeightsE0.*GemmShapeILi128.*Lb1ELb1E": 2,
    "MProduct.*WeightsE2.*Lb0ELb0E": 3 * 2,  # h, gate and up
    "MProduct.*WeightsE2.*Lb1ELb0E": 3 * 2,
    "MProduct.*WeightsE2.*Lb0ELb1E": 3,
    "MProduct.*WeightsE2.*Lb1ELb1E": 3,
    "KProduct.*GemmShapeILi256.*EEELb0E": 4,
    "KProduct.*GemmShapeILi256.*EEELb1E": 4,
    "KProduct.*GemmShapeILi192": 2 * 3,
    "CombineProduct.*Lb0E": 4,
    "CombineProduct.*Lb1E": 2,
    "HiddenBackwardProduct": 3 * 2 * 2,  # h and the gradients of gate and up
}
SCALED, GATHERING = r"(MProduct.*Lb[01]ELb1E|CombineProduct.*Lb1E)", r"(MProduct.*Lb1ELb[01]E|KProduct.*EEELb1E)"
# Instructions that kernels of this name must have: wgmma, tensor copies to both blocks of a cluster, tensor stores,
# mma, register budgets, barriers of a cluster.
REQUIRED = {
    **dict.fromkeys(PRODUCTS, ("UTMALDG", "UTMALDG.3D.MULTICAST", "UTMASTG", "USETMAXREG")),
    **{
        f"{kernel}INS0_{dtype}": ("HMMA", "UCGABAR_ARV", "UCGABAR_WAIT")
        for kernel in ("routing_fwd_kernel", "routing_bwd_means_kernel")
        for dtype in ("8BFloat16", "7Float16")
    },
}
KERNELS = (
    *PRODUCTS,
    *("routing_fwd_kernel", "routing_bwd_means_kernel", "routing_bwd_gradients_kernel"),
    *("topk_routing_tiles_kernel", "topk_routing_totals_kernel", "topk_routing_plan_kernel", "topk_routing_bwd_kernel"),
)


def cuobjdump(*arguments: str) -> str:
    """The program comes with the toolkit, and inside the triton wheel."""
    import triton.backends.nvidia as nvidia

    program = shutil.which("cuobjdump") or str(Path(nvidia.__file__).parent / "bin" / "cuobjdump")
    (binary,) = Path(parrot_kernels.__file__).parent.glob("_C.*")
    result = subprocess.run([program, *arguments, binary], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@functools.cache
def instructions() -> dict[str, str]:
    """Disassembly of each kernel by mangled name."""
    reason = _extension.why_not_cuda()
    assert reason is None, reason
    _, *functions = re.split(r"Function : (?=\S)", cuobjdump("-sass"))
    return dict(text.split("\n", 1) for text in functions)


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_kernel_spills(kernel: str) -> None:
    own = {name: body for name, body in instructions().items() if kernel in name}
    assert own, f"{kernel} is not in the extension"
    for name, body in own.items():
        assert not re.search(r"\b(LDL|STL)\b", body), f"{name} keeps values in local memory"


@pytest.mark.parametrize("kernel", REQUIRED)
def test_kernels_use_the_units_that_they_claim(kernel: str) -> None:
    own = {name: body for name, body in instructions().items() if kernel in name}
    assert own, f"{kernel} is not in the extension"
    for name, body in own.items():
        missing = [what for what in REQUIRED[kernel] if not re.search(rf"\b{re.escape(what)}\b", body)]
        assert not missing, f"{name} has no {', '.join(missing)}"


@pytest.mark.parametrize("pattern", STORES)
def test_results_leave_through_the_copy_engine_and_shared_operands_come_once(pattern: str) -> None:
    own = [body for name, body in instructions().items() if re.search(pattern, name)]
    assert len(own) == (4 if "E[01]" in pattern else 2), f"{pattern}: two types of elements, and two layouts of weights"
    for body in own:
        copies, shared = len(re.findall(r"\bUTMALDG\b", body)), len(re.findall(r"\bUTMALDG\.3D\.MULTICAST\b", body))
        assert len(re.findall(r"\bUTMASTG\b", body)) == STORES[pattern]
        # Each copy of an operand exists in a form for one block and in one for both; others bring in z or a residual.
        assert copies == 2 * shared if pattern[0] in "MK" else copies > 2 * shared


@pytest.mark.parametrize("kernel", PRODUCTS)
def test_float8_has_its_own_products_and_gathered_rows_come_by_asynchronous_copies(kernel: str) -> None:
    for name, body in instructions().items():
        if kernel in name:
            used = {what: bool(re.search(rf"\b{what}\b", body)) for what in ("HGMMA", "QGMMA", "LDGSTS")}
            scaled, gathers = bool(re.search(SCALED, name)), bool(re.search(GATHERING, name))
            assert used == {"HGMMA": not scaled, "QGMMA": scaled, "LDGSTS": gathers}, name


@pytest.mark.parametrize("kernel", PRODUCTS)
def test_no_fence_of_the_device_stands_among_the_products(kernel: str) -> None:
    """An arrival at a barrier of the other block that released writes would put one behind each stage."""
    for name, body in instructions().items():
        if kernel in name:
            order = re.findall(r"\b(GMMA|MEMBAR)\b", re.sub("[HQ]GMMA", "GMMA", body))
            inner = order[order.index("GMMA") : len(order) - order[::-1].index("GMMA")]
            assert "MEMBAR" not in inner, name


@pytest.mark.parametrize("kernel", PRODUCTS)
def test_products_of_a_stage_run_one_after_the_other_without_a_wait(kernel: str) -> None:
    """ptxas puts a wait behind each product when it cannot keep the accumulators apart."""
    for name, body in instructions().items():
        if kernel not in name:
            continue
        products, waits = len(re.findall(r"\b[HQ]GMMA\b", body)), len(re.findall(r"\bWARPGROUP\.DEPBAR\b", body))
        assert waits <= products // 4 + 1, f"{name} waits {waits} times for {products} products"
