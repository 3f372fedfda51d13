"""Writes tasks of lmms-eval for benchmark tables.

    python -m parrot_sys.integrations.lmms_eval --output tasks MMMB_en.tsv MMMB_tr.tsv MMBench_dev_ar.tsv
    lmms-eval --model parrot --model_args pretrained=CHECKPOINT --include_path tasks --tasks mmmb_en,mmmb_tr

Prompts, and how answers are read, are those of `parrot eval`. Any model of lmms-eval can be asked.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from parrot_sys.cli import run_main
from parrot_sys.evaluation.tsv import find_tables
from parrot_sys.integrations.lmms_eval.tables import write_tasks


def main(argv: Sequence[str]) -> int:
    """Writes the tasks and prints their names.

    Raises:
        DataError: a table cannot be a task, or there is none.
    """
    parser = argparse.ArgumentParser(
        prog="python -m parrot_sys.integrations.lmms_eval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tables", nargs="+", metavar="TABLE", help="TSV files, or folders with them")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder for lmms-eval's --include_path"
    )
    own = parser.parse_args(argv)
    print(",".join(write_tasks(find_tables(own.tables), own.output)))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:], prog="python -m parrot_sys.integrations.lmms_eval"))
