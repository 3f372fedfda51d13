"""VLMEvalKit's own run.py with a model of parrot_sys.

    python -m parrot_sys.integrations.vlmevalkit --kit VLMEvalKit --checkpoint DIR --data MMMB --judge exact_matching
    python -m parrot_sys.integrations.vlmevalkit --kit VLMEvalKit --server http://127.0.0.1:8000 --data MMMB ...

The model's name in reports is `parrot`, unless --model gives another. All else is handed to run.py (--help of it
follows). Questions with options have the prompts of `parrot eval`, with the instruction in the table's language.
A server that asks for a key gets that of PARROT_API_KEY or LMDEPLOY_API_KEY, or of --key.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from parrot_sys import platform
from parrot_sys.cli import exit_with, run_main
from parrot_sys.errors import ConfigError, ParrotError

NAME = "parrot"
"""Of the model, where --model does not give one."""
PROG = "python -m parrot_sys.integrations.vlmevalkit"
_OTHER_MODELS = {"--base-url": "take --server", "--config": "name the data sets with --data"}
"""Options of run.py that choose its own models -> what to do here."""


def parser() -> argparse.ArgumentParser:
    """Parser of our own options."""
    own = argparse.ArgumentParser(
        prog=PROG,
        description=__doc__,
        add_help=False,
        allow_abbrev=False,  # run.py's --mode is no --model
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    own.add_argument("--kit", type=Path, metavar="DIR", help="a checkout of VLMEvalKit")
    model = own.add_mutually_exclusive_group()
    model.add_argument("--checkpoint", metavar="DIR", help="exported directory or training run")
    model.add_argument("--server", metavar="URL", help="of `parrot serve`, for example http://127.0.0.1:8000")
    own.add_argument("--model", default=NAME, help="name in reports")
    own.add_argument("--key", help="that the server asks for; in PARROT_API_KEY others on the machine do not see it")
    own.add_argument("--max-new-tokens", type=int, default=512, help="longest answer")
    own.add_argument("--device", help="with --checkpoint; a GPU if there is one when not given")
    return own


def main(argv: Sequence[str]) -> None:
    """Registers the model and runs run.py.

    Raises:
        ConfigError: there is no checkout, no model or another one is named, or there is no room for an answer.
    """
    own, others = parser().parse_known_args(argv)
    asks = {"-h", "--help"} & set(others)
    if asks:
        parser().print_help()
    if own.kit is None or not (script := own.kit / "run.py").is_file():
        raise ConfigError(f"--kit must be a checkout of VLMEvalKit with its run.py, got {own.kit}")
    if not asks and own.checkpoint is None and own.server is None:
        raise ConfigError("name the model: --checkpoint DIR, or --server URL")
    _check(own, others)
    sys.path.insert(0, str(own.kit.resolve()))
    if not asks:
        _register(own)
    sys.argv = [str(script), "--model", own.model, *others]
    runpy.run_path(str(script), run_name="__main__")


def _check(own: argparse.Namespace, others: Sequence[str]) -> None:
    if own.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens must be >= 1, got {own.max_new_tokens}")
    for name in (other.partition("=")[0] for other in others if other.startswith("--") and len(other) > 2):
        if found := [option for option in _OTHER_MODELS if option.startswith(name)]:
            raise ConfigError(f"{found[0]} of run.py chooses another model: {_OTHER_MODELS[found[0]]}")


def _register(own: argparse.Namespace) -> None:
    """Makes the model known under its name."""
    from vlmeval.config import supported_VLM

    from parrot_sys.integrations.vlmevalkit import vlmevalkit_models as models

    if own.model in supported_VLM:
        raise ConfigError(f"--model must be no name that the kit has a model for, got {own.model}; take another")
    size = {"max_new_tokens": own.max_new_tokens}
    if own.server is None:
        build = partial(_built, models.ParrotVLM, own.checkpoint, device=own.device, **size)
    else:  # (run.py sets `retry` and `verbose` of its options where they are)
        key = (own.key or platform.api_key()).strip()
        build = partial(_built, models.ParrotServer, own.server, key=key, retry=5, verbose=False, **size)
    supported_VLM[own.model] = build


def _built(cls: Any, place: str, **settings: Any) -> Any:
    """The model, or the end of the program: after any other error run.py would go on to the next data set."""
    try:
        return cls(place, **settings)
    except ParrotError as error:
        exit_with(error, PROG)


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:], prog=PROG))
