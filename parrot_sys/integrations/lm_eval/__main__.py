"""lm-eval's own command with the model `parrot`, and with tasks from local files.

    python -m parrot_sys.integrations.lm_eval [--data DIR] run --model parrot --model_args pretrained=CHECKPOINT \\
        --tasks mmlu,cmmlu,arc_easy,arc_challenge,hellaswag,winogrande,race

With --data every data set comes from DIR/OWNER/NAME, a copy of its repository as tasks name it (DIR/allenai/ai2_arc,
DIR/Rowan/hellaswag, ...), and none from a network: `hf download --repo-type dataset OWNER/NAME --local-dir
DIR/OWNER/NAME` makes one. Files that a task names itself (`dataset_path: json`, `csv`, ...) are read where they are.
All else is lm-eval's: `... run --help`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import parrot_sys  # noqa: F401  (lets lm-eval know the model)
from parrot_sys.cli import run_main
from parrot_sys.integrations.lm_eval.local_data import loader_from


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
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as builders
    from lm_eval.__main__ import cli_evaluate

    if own.data is not None:
        datasets.load_dataset = loader_from(own.data, datasets.load_dataset, builders)
    sys.argv = ["lm_eval", *others]
    cli_evaluate()


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:], prog="python -m parrot_sys.integrations.lm_eval"))
