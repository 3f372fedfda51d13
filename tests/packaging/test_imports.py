"""What importing the packages may cost: no CUDA, no optional accelerator, nothing heavy for the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

IMPORT_ALL = """
import importlib, pkgutil, sys

# To an import they are missing, and to importlib.util.find_spec, by which transformers looks for them, as well.
sys.modules.update(dict.fromkeys(BLOCKED))
names = []
for package in map(importlib.import_module, PACKAGES):
    names += [m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
names = [n for n in names if n.rsplit(".")[-1] not in {"_C", "__main__", *SKIPPED}]
names = [n for n in names if not n.startswith("parrot_sys.integrations.megatron_bridge.")]  # imports what is not here
for name in names:
    importlib.import_module(name)
import torch
assert not torch.cuda.is_initialized(), "an import initialised CUDA"
print(len(names))
"""
# The modules that are written in Triton; only the launchers of `triton_impl` and `compile_only` import them.
IN_TRITON = [
    *("triton_impl", "launches", "kernels", "tiles", "attention_tiles", "triton_support", "compile_cases"),
    *("compile_only", "quantize"),
]
OF_TOOLS = ["lm_eval_model", "lmms_eval_model", "ms_swift_plugin", "vlmevalkit_models"]
"""Modules that the program of somebody else imports."""
ACCELERATORS = ["transformer_engine", "apex", "amp_C", "flash_attn"]


def run_python(code: str) -> str:
    """stdout of `python -c code`, run in the root of the project."""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def import_all(packages: list[str], blocked: list[str], skipped: list[str]) -> int:
    """Imports the modules below `packages` except those named `skipped` in a fresh process; how many there were."""
    return int(run_python(f"PACKAGES = {packages}\nBLOCKED = {blocked}\nSKIPPED = {skipped}\n{IMPORT_ALL}"))


def test_everything_imports_without_accelerators_and_without_cuda() -> None:
    assert import_all(["parrot_kernels", "parrot_sys"], ACCELERATORS, OF_TOOLS) > 50


def test_what_stands_below_megatron_imports_without_it_and_without_triton() -> None:
    lower = ["parrot_kernels", *(f"parrot_sys.{name}" for name in ("ops", "parallel", "modules", "models", "data"))]
    assert import_all(lower, [*ACCELERATORS, "triton", "megatron"], IN_TRITON) > 30


def test_the_command_imports_neither_torch_nor_megatron() -> None:
    code = (
        "import sys, parrot_sys.__main__; print([m for m in ('torch', 'megatron', 'transformers') if m in sys.modules])"
    )
    assert run_python(code) == "[]"


def test_ops_import_without_megatron() -> None:
    heavy = "('megatron', 'transformers', 'transformer_engine', 'apex')"
    code = f"import sys, parrot_sys.ops, parrot_sys.modules; print([m for m in {heavy} if m in sys.modules])"
    assert run_python(code) == "[]"


def test_the_folder_kernels_does_not_shadow_the_package_of_that_name() -> None:
    # transformers imports Hugging Face's `kernels` where it is installed; ours must never answer for it.
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin or 'none')"
    origin = run_python(code)
    assert origin == "none" or "site-packages" in origin


def test_tokenizers_do_not_import_the_models_of_transformers() -> None:
    code = "import sys, parrot_sys.data.processor; print([m for m in sys.modules if m.endswith('.modeling_utils')])"
    assert run_python(code) == "[]"
