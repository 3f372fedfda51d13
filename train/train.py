"""`parrot train` for torchrun: torchrun --nproc-per-node 2 train/train.py --config PRESET --data.paths FILE --output DIR."""

# Imports stay inside the guard: saving a checkpoint starts a helper process that imports this file again.
if __name__ == "__main__":
    import sys

    from parrot_sys.cli import run_main
    from parrot_sys.training.main import main

    sys.exit(run_main(main, sys.argv[1:], prog="train.py"))
