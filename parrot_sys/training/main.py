"""`parrot train`: reads the configuration, trains, and says where the results are."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from parrot_sys.cli import parse_config
from parrot_sys.logging import setup_logging
from parrot_sys.processes import EXIT_INTERRUPTED
from parrot_sys.training.config import TrainConfig

DESCRIPTION = """Trains Parrot in one process, or in several under torchrun.

After `parrot data build --output data/default`:

  $ parrot train --config parrot_tiny_cpu --config tiny_instruct --data.paths data/default/instruct.json \\
        --checkpoint.load-from data/default/decoder --model.tokenizer-path data/default/tokenizer --output runs/first

In two processes, with the same options:

  $ torchrun --nproc-per-node 2 -m parrot_sys train ...

The same command again goes on from the last checkpoint."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `parrot train` with `argv`; 0 when the run ended, also by SIGTERM, 130 after Ctrl-C."""
    config = parse_config(TrainConfig, argv, prog="parrot train", description=DESCRIPTION)
    setup_logging()
    # Megatron takes seconds to import: wrong settings are told before that.
    from torch import distributed as dist

    from parrot_sys.megatron.runtime.initialize import shutdown
    from parrot_sys.training.export import exported_step
    from parrot_sys.training.trainer import Trainer

    trainer = Trainer(config)
    trainer.run()
    speaks = dist.get_rank() == 0
    shutdown()
    if speaks and (step := exported_step(trainer.export_folder)) is not None:
        later = "" if step == trainer.step else f"; the run is at step {trainer.step}, its end exports it anew"
        print(f"model: {trainer.export_folder} (step {step}{later})", file=sys.stderr)
    return EXIT_INTERRUPTED if trainer.stop.received == signal.SIGINT else 0
