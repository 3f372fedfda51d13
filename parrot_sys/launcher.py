"""torchrun that ends quietly: `python -m parrot_sys.launcher` takes torchrun's arguments.

When it is asked to stop, it asks its workers, waits until they have saved, and ends with 128 + the signal's number;
when a worker fails, it ends with that one's exit code. torchrun itself prints its own stack in both cases, and the
worker's message gets lost above it. Workers are always asked by SIGTERM, which is silent where Ctrl-C would interrupt
an import.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from parrot_sys.processes import EXIT_INTERRUPTED


def main(argv: Sequence[str]) -> int:
    """Runs torchrun with `argv`; its exit code."""
    interrupted = False

    def ask_workers(*_: object) -> None:
        nonlocal interrupted
        interrupted = True
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGINT, ask_workers)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser
    from torch.distributed.run import main as torchrun

    # Without this option, in older versions of torch, torchrun itself passes Ctrl-C to the workers as it is.
    known = any("--signals-to-handle" in action.option_strings for action in get_args_parser()._actions)
    own = ["--signals-to-handle", "SIGTERM,SIGHUP,SIGQUIT"] if known else []
    try:
        torchrun([*own, *argv])
    except SignalException as stop:
        return EXIT_INTERRUPTED if interrupted else 128 + stop.sigval
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
