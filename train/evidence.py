"""Writes the tables of docs/evidence.md from the kept results in benchmarks/results/cpu.

python train/evidence.py            after `make experiment ...` has written new results
python train/evidence.py --check    only says whether the page is up to date (exit code 1 when it is not)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="evidence.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    from parrot_sys.files import replace_text
    from studies.claims import CLAIMS
    from studies.evidence import place, render

    page = ROOT / "docs" / "evidence.md"
    old = page.read_text(encoding="utf-8")
    new = place(old, render(CLAIMS, ROOT / "benchmarks" / "results" / "cpu"))
    if old == new:
        print(f"{page}: up to date")
        return 0
    if options.check:
        print(f"{page}: other results are kept than it shows; run python train/evidence.py")
        return 1
    replace_text(page, new)
    print(f"{page}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
