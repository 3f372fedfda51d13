"""`parrot train` for torchrun: torchrun --nproc-per-node 2 train/train.py --config PRESET --output DIR ..."""

from __future__ import annotations

import sys

from parrot_sys.cli import run_main
from parrot_sys.training.main import main

if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:], prog="train.py"))
