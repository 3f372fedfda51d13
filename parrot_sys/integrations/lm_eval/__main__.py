"""lm-eval's own command with the model `parrot`, and with tasks from local files.

    python -m parrot_sys.integrations.lm_eval [--data DIR] run --model parrot --model_args pretrained=CHECKPOINT \\
        --tasks mmlu,cmmlu,arc_easy,arc_challenge,hellaswag,winogrande,race

With --data every data set comes from DIR/OWNER/NAME, a copy of its repository as tasks name it (DIR/allenai/ai2_arc,
DIR/Rowan/hellaswag, ...), and none from a network: `hf download --repo-type dataset OWNER/NAME --local-dir
DIR/OWNER/NAME` makes one. All else is lm-eval's: `... run --help`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import parrot_sys  # noqa: F401  (lets lm-eval know the model)
from parrot_sys.errors import DataError


def main(argv: Sequence[str]) -> None:
    """Runs lm-eval's command.

    Raises:
        DataError: a data set is not below --data.
    """
    parser = argparse.ArgumentParser(
        prog="python -m parrot_sys.integrations.lm_eval",
        description=__doc__,
        add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with copies of the tasks' data sets")
    own, others = parser.parse_known_args(argv)
    if others in ([], ["--help"], ["-h"]):
        parser.print_help()
    import datasets
    from lm_eval.__main__ import cli_evaluate

    if own.data is not None:
        datasets.load_dataset = _from_folder(own.data, datasets.load_dataset)
    sys.argv = ["lm_eval", *others]
    cli_evaluate()


def _from_folder(root: Path, load: Callable[..., Any]) -> Callable[..., Any]:
    """`datasets.load_dataset` that takes what a task names from a folder."""

    def load_dataset(path: str, *args: Any, **kwargs: Any) -> Any:
        folder = root / path
        if not folder.is_dir():
            raise DataError(
                f"--data {root} has no folder {path}, which a task takes its questions from: "
                f"hf download --repo-type dataset {path} --local-dir {folder}"
            )
        return load(str(folder), *args, **kwargs)

    return load_dataset


if __name__ == "__main__":
    main(sys.argv[1:])
