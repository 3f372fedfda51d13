"""VLMEvalKit's own run.py with a model of parrot_sys.

    python -m parrot_sys.integrations.vlmevalkit --kit VLMEvalKit --checkpoint DIR --data MMMB --judge exact_matching
    python -m parrot_sys.integrations.vlmevalkit --kit VLMEvalKit --server http://127.0.0.1:8000 --data MMMB ...

The model's name in reports is `parrot`, unless --model gives another. All else is handed to run.py (--help of it
follows). Questions with options have the prompts of `parrot eval`, with the instruction in the table's language.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from parrot_sys.errors import ConfigError

NAME = "parrot"
"""Of the model, where --model does not give one."""


def parser() -> argparse.ArgumentParser:
    """Parser of our own options."""
    own = argparse.ArgumentParser(
        prog="python -m parrot_sys.integrations.vlmevalkit",
        description=__doc__,
        add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    own.add_argument("--kit", type=Path, metavar="DIR", help="a checkout of VLMEvalKit")
    model = own.add_mutually_exclusive_group()
    model.add_argument("--checkpoint", metavar="DIR", help="exported directory or training run")
    model.add_argument("--server", metavar="URL", help="of `parrot serve`, for example http://127.0.0.1:8000")
    own.add_argument("--model", default=NAME, help="name in reports")
    own.add_argument("--max-new-tokens", type=int, default=512, help="longest answer")
    own.add_argument("--device", help="with --checkpoint; a GPU if there is one when not given")
    return own


def main(argv: Sequence[str]) -> None:
    """Registers the model and runs run.py.

    Raises:
        ConfigError: there is no checkout, or no model is named.
    """
    own, others = parser().parse_known_args(argv)
    asks = {"-h", "--help"} & set(others)
    if asks:
        parser().print_help()
    if own.kit is None or not (script := own.kit / "run.py").is_file():
        raise ConfigError(f"--kit must be a checkout of VLMEvalKit with its run.py, got {own.kit}")
    if not asks and own.checkpoint is None and own.server is None:
        raise ConfigError("name the model: --checkpoint DIR, or --server URL")
    sys.path.insert(0, str(own.kit.resolve()))
    if not asks:
        _register(own)
    sys.argv = [str(script), "--model", own.model, *others]
    runpy.run_path(str(script), run_name="__main__")


def _register(own: argparse.Namespace) -> None:
    """Makes the model known under its name."""
    from vlmeval.config import supported_VLM

    from parrot_sys.integrations.vlmevalkit import vlmevalkit_models as models

    if own.server is None:
        build = partial(models.ParrotVLM, own.checkpoint, max_new_tokens=own.max_new_tokens, device=own.device)
    else:
        build = partial(models.ParrotServer, own.server, max_new_tokens=own.max_new_tokens)
    supported_VLM[own.model] = build


if __name__ == "__main__":
    main(sys.argv[1:])
