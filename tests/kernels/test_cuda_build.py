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

# Instructions that kernels of this name must have: wgmma, tensor copies, mma, register budgets.
REQUIRED = {
    "m_grouped_gemm_kernel": ("HGMMA", "UTMALDG", "USETMAXREG"),
    "k_grouped_gemm_kernel": ("HGMMA", "UTMALDG", "USETMAXREG"),
    "routing_fwd_kernelINS0_8BFloat16": ("HMMA",),
    "routing_fwd_kernelINS0_7Float16": ("HMMA",),
    "routing_bwd_means_kernelINS0_8BFloat16": ("HMMA",),
    "routing_bwd_means_kernelINS0_7Float16": ("HMMA",),
}
KERNELS = (
    *("m_grouped_gemm_kernel", "k_grouped_gemm_kernel"),
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
        missing = [what for what in REQUIRED[kernel] if not re.search(rf"\b{what}\b", body)]
        assert not missing, f"{name} has no {', '.join(missing)}"


@pytest.mark.parametrize("kernel", ["m_grouped_gemm_kernel", "k_grouped_gemm_kernel"])
def test_products_of_a_stage_run_one_after_the_other_without_a_wait(kernel: str) -> None:
    """ptxas puts a wait behind each product when it cannot keep the accumulators apart."""
    for name, body in instructions().items():
        if kernel not in name:
            continue
        order = re.findall(r"\b(HGMMA|WARPGROUP\.DEPBAR)\b", body)
        products, waits = order.count("HGMMA"), order.count("WARPGROUP.DEPBAR")
        assert waits <= products // 4 + 1, f"{name} waits {waits} times for {products} products"
