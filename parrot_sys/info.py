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
from typing import Any

import torch

from parrot_kernels import _extension, env, host
from parrot_sys import platform
from parrot_sys.cli import list_presets
from parrot_sys.markdown_tables import table
from parrot_sys.megatron.runtime import backends
from parrot_sys.ops import registry
from parrot_sys.version import __version__

SECTIONS = ("versions", "build", "hardware", "environment", "optional", "layers")
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
            "transformer_engine": _found(backends.transformer_engine(), "transformer-engine"),
            "apex": _found(backends.apex(), "apex"),
            "flash_attention": _flash_attention(),
            "nccl": _nccl(),
        },
        "layers": backends.in_use(),
        "presets": sorted(list_presets()),
    }


def render(facts: dict[str, Any]) -> str:
    """Text for a terminal."""
    lines: list[str] = []
    for section in SECTIONS:
        lines.append(f"{section}:")
        lines += [f"  {name:20} {value}" for name, value in facts[section].items()]
    lines.append("ops (the first of cuda, triton, cpu, reference that takes the arguments runs):")
    for op, reasons in facts["ops"].items():
        lines.append(f"  {op}")
        lines += [f"    {name:10} {'yes' if reason is None else 'no: ' + reason}" for name, reason in reasons.items()]
    lines.append(f"presets: {', '.join(facts['presets']) or 'none'}")
    return "\n".join(lines)


def render_markdown(facts: dict[str, Any]) -> str:
    """The same as tables, for a bug report."""
    lines: list[str] = []
    for section in SECTIONS:
        rows = [[name, str(value)] for name, value in facts[section].items()]
        lines += [*table([section, ""], rows, numbers=False), ""]
    rows = [[op, *(reasons[name] or "yes" for name in registry.BACKENDS)] for op, reasons in facts["ops"].items()]
    lines += table(["op", *registry.BACKENDS], rows, numbers=False)
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
    """Facts that setup.py wrote, and whether the binaries load."""
    facts: dict[str, Any] = {"extension": _extension.why_not() or "loaded"}
    facts["cuda kernels"] = _extension.why_not_cuda() or "built"
    facts["data packing"] = host.why_not() or "compiled"
    # Written by setup.py only when it builds the extension.
    if importlib.util.find_spec("parrot_kernels._build_info"):
        module = importlib.import_module("parrot_kernels._build_info")
        for name, value in vars(module).items():
            if not name.startswith("_") and value:
                facts[name] = " ".join(value) if isinstance(value, list) else value
    return facts


def _hardware() -> dict[str, Any]:
    facts: dict[str, Any] = {"cpu threads": torch.get_num_threads(), "torch build": platform.gpu_toolkit() or "CPU"}
    if platform.cuda_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        facts["gpus"] = ", ".join(names)
    else:
        facts["gpus"] = "none visible" if platform.gpu_toolkit() else "none: this torch is a CPU build"
    return facts


def _found(why_not: str | None, distribution: str) -> str:
    return f"no: {why_not}" if why_not else f"yes: {_version(distribution) or 'unknown version'}"


def _flash_attention() -> str:
    found = [f"{name} {version}" for name in ("flash-attn", "flash-attn-3") if (version := _version(name))]
    return f"yes: {', '.join(found)}" if found else "no: not installed; torch's scaled_dot_product_attention is used"


def _nccl() -> str:
    if not torch.distributed.is_nccl_available():
        return "no: this torch is built without NCCL; gloo is used"
    return "yes: " + ".".join(map(str, torch.cuda.nccl.version()))


if __name__ == "__main__":
    sys.exit(main())
