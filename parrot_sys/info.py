"""`parrot info`: versions, devices, and for each op and back end whether it runs here and why not."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import platform as system
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from parrot_kernels import _extension, env
from parrot_sys import __version__, platform
from parrot_sys.cli import list_presets
from parrot_sys.ops import registry

PACKAGES = ("torch", "triton", "megatron-core", "transformers", "tokenizers", "numpy")


def collect() -> dict[str, Any]:
    """Everything that `parrot info` shows, as plain values."""
    return {
        "versions": {
            "parrot_sys": __version__,
            "python": system.python_version(),
            **{name: _version(name) or "not installed" for name in PACKAGES},
        },
        "build": _build_facts(),
        "hardware": _hardware(),
        "environment": {"PARROT_BACKEND": _forced_backend(), "TRITON_INTERPRET": env.triton_interpret()},
        "ops": registry.available(),
        "optional": {
            "transformer_engine": _transformer_engine(),
            "apex": _apex(),
            "flash_attention": _flash_attention(),
            "nccl": _nccl(),
        },
        "presets": sorted(list_presets()),
    }


def render(facts: dict[str, Any]) -> str:
    """Text for a terminal."""
    lines: list[str] = []
    for section in ("versions", "build", "hardware", "environment", "optional"):
        lines.append(f"{section}:")
        lines += [f"  {name:20} {value}" for name, value in facts[section].items()]
    lines.append("ops (the first of cuda, triton, cpu, reference that takes the arguments runs):")
    for op, backends in facts["ops"].items():
        lines.append(f"  {op}")
        lines += [f"    {name:10} {'yes' if reason is None else 'no: ' + reason}" for name, reason in backends.items()]
    lines.append(f"presets: {', '.join(facts['presets']) or 'none'}")
    return "\n".join(lines)


def render_markdown(facts: dict[str, Any]) -> str:
    """The same as tables, for a bug report."""
    lines = []
    for section in ("versions", "build", "hardware", "environment", "optional"):
        rows = [f"| {name} | {value} |" for name, value in facts[section].items()]
        lines += [f"| {section} | |", "|---|---|", *rows, ""]
    lines += [f"| op | {' | '.join(registry.BACKENDS)} |", "|---" * (len(registry.BACKENDS) + 1) + "|"]
    for op, backends in facts["ops"].items():
        cells = ["yes" if backends[name] is None else backends[name] for name in registry.BACKENDS]
        lines.append(f"| {op} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Presets: {', '.join(facts['presets']) or 'none'}"])


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the facts as text, Markdown or JSON."""
    parser = argparse.ArgumentParser(prog="parrot info", description=__doc__)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="tables, for a bug report")
    form.add_argument("--json", action="store_true", help="for programs")
    arguments = parser.parse_args(argv)
    facts = collect()
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        print(render_markdown(facts) if arguments.markdown else render(facts))
    return 0


def _forced_backend() -> str:
    try:
        return env.backend()
    except ValueError as error:
        return f"invalid: {error}"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _build_facts() -> dict[str, Any]:
    """What setup.py wrote, and whether the binaries load."""
    facts: dict[str, Any] = {"extension": _extension.why_not() or "loaded"}
    facts["cuda kernels"] = _extension.why_not_cuda() or "built"
    # Written by setup.py only when it builds the extension.
    if importlib.util.find_spec("parrot_kernels._build_info"):
        module = importlib.import_module("parrot_kernels._build_info")
        for name, value in vars(module).items():
            if not name.startswith("_") and value:
                facts[name] = " ".join(value) if isinstance(value, list) else value
    return facts


def _hardware() -> dict[str, Any]:
    facts: dict[str, Any] = {"cpu threads": torch.get_num_threads(), "torch cuda": torch.version.cuda or "CPU build"}
    if platform.cuda_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        facts["gpus"] = ", ".join(names)
    else:
        facts["gpus"] = "none visible" if torch.version.cuda else "none: this torch is a CPU build"
    return facts


def _transformer_engine() -> str:
    version = _version("transformer-engine")
    if version is None:
        return "no: not installed (pip install --no-build-isolation 'parrot_sys[te]', on CUDA machines only)"
    if _version("transformer-engine-torch") is None:
        return f"no: {version} is installed without its torch part; install transformer-engine[core_cu13,pytorch]"
    return f"yes: {version}"


def _apex() -> str:
    """NVIDIA's apex is told from the unrelated PyPI project of that name by what it contains."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "no: not installed (build it from NVIDIA's sources; the PyPI project `apex` is something else)"
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if not any((folder / "multi_tensor_apply").is_dir() for folder in folders):
        return "no: the installed `apex` is not NVIDIA's (it has no apex.multi_tensor_apply)"
    if importlib.util.find_spec("amp_C") is None:
        return "no: NVIDIA apex is installed without its C++ extensions (amp_C)"
    return f"yes: {_version('apex') or 'unknown version'}"


def _flash_attention() -> str:
    found = [f"{name} {version}" for name in ("flash-attn", "flash-attn-3") if (version := _version(name))]
    return f"yes: {', '.join(found)}" if found else "no: not installed; torch's scaled_dot_product_attention is used"


def _nccl() -> str:
    if not torch.distributed.is_nccl_available():
        return "no: this torch is built without NCCL; gloo is used"
    return "yes: " + ".".join(map(str, torch.cuda.nccl.version()))


if __name__ == "__main__":
    sys.exit(main())
