"""Runs an unmodified program of Megatron-LM with the parts of this package at hand, on GPUs or on CPU processes.

    python -m parrot_sys.megatron.run pretrain_gpt.py ARGS...
    torchrun --nproc-per-node 2 -m parrot_sys.megatron.run pretrain_gpt.py ARGS...
    ... --spec parrot_sys.megatron.specs layer    (our router and experts; see that module)

With CUDA the program runs as it is, after `parrot_sys.megatron` was imported. Without, all of `megatron` is adapted to
the CPU (gloo) and gets an Adam; a line says so, and PARROT_CPU_LAYER=0 leaves everything as it is. The last is for
trying settings, layouts and losses at small sizes, not for speed.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from parrot_sys.logging import setup_logging
from parrot_sys.megatron.runtime import cpu_layer

logger = logging.getLogger("parrot_sys.megatron.run")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program that the first argument names, as `python` would.

    Args:
        argv: path of the program and its arguments; those of this process when not given.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(f"{(__doc__ or '').strip()}\n")
        return 0 if arguments else 2
    script = Path(arguments[0])
    if not script.is_file():
        sys.stderr.write(f"parrot_sys.megatron.run: error: no program at {script}: give the path of a script\n")
        return 2
    setup_logging(own_program=False)
    sys.argv = arguments
    sys.path.insert(0, str(script.resolve().parent))
    if cpu_layer.is_installed():
        logger.info("Megatron-LM runs on the CPU in this process; PARROT_CPU_LAYER=0 leaves it as it is")
        _prepare_cpu()
    runpy.run_path(str(script), run_name="__main__")
    return 0


def _prepare_cpu() -> None:
    """Adapts all of Megatron-LM, and puts its CUDA extensions and optimizers aside."""
    cpu_layer.widen()
    from parrot_sys.megatron.runtime.adam import install_adam

    install_adam()
    with contextlib.suppress(ImportError):  # up to 0.16: builds CUDA sources
        importlib.import_module("megatron.legacy.fused_kernels").load = lambda _: None  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main())
