"""The console command `parrot`. A subcommand's module is imported only when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from parrot_sys import __version__
from parrot_sys.cli import nearest, run_main


@dataclass(frozen=True)
class _Command:
    module: str
    summary: str
    examples: tuple[str, str]


COMMANDS = {
    "data": _Command(
        "parrot_sys.data.main",
        "Build the default data set (pictures, conversations, questions), import public sets, check record files.",
        (
            "parrot data build --output data/default",
            "parrot data check train.json --config parrot_7b --config parrot_instruct --model.tokenizer-path qwen",
        ),
    ),
    "train": _Command(
        "parrot_sys.training.main",
        "Train a model in its stages, in one process or under torchrun.",
        (
            "parrot train --config parrot_tiny_cpu --config tiny_instruct --data.paths data/default/instruct.json "
            "--checkpoint.load-from data/default/decoder --model.tokenizer-path data/default/tokenizer "
            "--output runs/first",
            "torchrun --nproc-per-node 2 -m parrot_sys train ...   # the same options",
        ),
    ),
    "plan": _Command(
        "parrot_sys.planning.main",
        "Predict memory and step time of every parallel layout on a cluster, and say which to use.",
        (
            "parrot plan --config parrot_7b --config parrot_instruct --cluster.gpu H200 --cluster.nodes 2",
            "parrot plan --help",
        ),
    ),
    "eval": _Command(
        "parrot_sys.evaluation.main",
        "Answer MMMB / MMBench questions with a checkpoint and report accuracy per language and category.",
        (
            "parrot eval --checkpoint runs/first/hf --data data/default/benchmark --output runs/first/eval",
            "parrot eval --help",
        ),
    ),
    "compare": _Command(
        "parrot_sys.evaluation.answer_lengths",
        "Compare how long two evaluated models answer the same questions.",
        ("parrot compare --evaluations runs/a/eval runs/b/eval --names with-vqa without", "parrot compare --help"),
    ),
    "attention": _Command(
        "parrot_sys.evaluation.attention",
        "Measure, layer by layer, the attention on the text before and after an image.",
        (
            "parrot attention --checkpoint runs/first/hf --data data/default/iit --output runs/first/attention",
            "parrot attention --help",
        ),
    ),
    "chat": _Command(
        "parrot_sys.inference.chat",
        "Talk to a checkpoint about pictures, in any language, and see which experts answered.",
        ("parrot chat --checkpoint runs/first", "parrot chat --checkpoint runs/first --image cat.png --show-routing"),
    ),
    "serve": _Command(
        "parrot_sys.serving.main",
        "Serve a checkpoint behind OpenAI's interface, with a page to try it in the browser.",
        ("parrot serve --checkpoint runs/first", "parrot serve --help"),
    ),
    "convert": _Command(
        "parrot_sys.inference.convert",
        "Turn checkpoints from and to the released Hugging Face layout.",
        ("parrot convert --checkpoint runs/first --output first-hf", "parrot convert --help"),
    ),
    "info": _Command(
        "parrot_sys.info",
        "Show versions, devices, and for each op which back end runs here and why another does not.",
        ("parrot info", "parrot info --json"),
    ),
}


_MODULES = {
    "data check": "parrot_sys.training.data_check",
    "data describe": "parrot_sys.training.data_describe",
    "data index": "parrot_sys.training.data_index",
}
"""Commands of two words that do not belong to the module of the first."""


def help_text() -> str:
    """The text that `parrot --help` prints."""
    lines = [
        f"parrot {__version__}: trains, evaluates and talks to text-guided, expert-routed multimodal language models.",
        "",
        "usage: parrot COMMAND [options]        parrot COMMAND --help explains each option",
        "",
    ]
    for name, command in COMMANDS.items():
        lines += [f"  {name:9} {command.summary}", *(f"              $ {example}" for example in command.examples), ""]
    lines += [
        "Settings come from presets and YAML files (--config NAME_OR_PATH, repeatable) and from flags; flags win.",
        "--traceback (or PARROT_TRACEBACK=1) shows where an error came from.",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Returns:
        The exit code: 0, or 2 for a wrong command line or an error that the user can fix.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    known = bool(arguments) and arguments[0] in COMMANDS
    return run_main(_run, arguments, prog=f"parrot {arguments[0]}" if known else "parrot")


def _run(arguments: Sequence[str]) -> int | None:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        guess = nearest(name, list(COMMANDS))
        hint = f"did you mean `parrot {guess}`?" if guess else "`parrot --help` lists them."
        print(f"parrot: error: unknown command {name!r}, want one of {', '.join(COMMANDS)}; {hint}", file=sys.stderr)
        return 2
    module, rest = COMMANDS[name].module, arguments[1:]
    if " ".join(arguments[:2]) in _MODULES:
        module, rest = _MODULES[" ".join(arguments[:2])], arguments[2:]
    result: int | None = importlib.import_module(module).main(rest)
    return result


if __name__ == "__main__":
    sys.exit(main())
