"""Replicas that are forked from the process in front: without the seconds in which each would import what that has."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

FAULT_CODE = 3


@dataclass(kw_only=True)
class Forked:
    """What a replica needs of `asyncio.subprocess.Process`."""

    pid: int
    stderr: asyncio.StreamReader
    returncode: int | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def terminate(self) -> None:
        """Asks it to end."""
        os.kill(self.pid, signal.SIGTERM)

    async def wait(self) -> int:
        """Its exit code."""
        await self.ended.wait()
        assert self.returncode is not None, "it has ended"
        return self.returncode

    async def watch(self) -> None:
        """Waits for its end."""
        _, status = await asyncio.to_thread(os.waitpid, self.pid, 0)
        self.returncode = os.waitstatus_to_exitcode(status)
        self.ended.set()


def fork_replicas(fault: str) -> None:
    """Replicas of this process are forked from it; those that start while the file `fault` is there end at once."""
    watching = set()

    async def forked(*command: str, stderr: int, preexec_fn: Callable[[], None]) -> Forked:
        assert command[1:4] == ("-m", "parrot_sys", "serve"), command
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            _run(command[3:], write, preexec_fn, fault)
        os.close(write)
        reader = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read, "rb"))
        made = Forked(pid=pid, stderr=reader)
        task = asyncio.create_task(made.watch())
        watching.add(task)
        task.add_done_callback(watching.discard)
        return made

    asyncio.create_subprocess_exec = forked  # type: ignore[assignment]


def _run(argv: tuple[str, ...], log: int, prepare: Callable[[], None], fault: str) -> None:
    from parrot_sys.__main__ import main

    code = FAULT_CODE
    try:
        os.dup2(log, 2)
        os.closerange(3, os.sysconf("SC_OPEN_MAX") if os.sysconf("SC_OPEN_MAX") < 2**16 else 2**16)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        prepare()
        if not Path(fault).exists():
            code = main(list(argv))
    finally:
        os._exit(code)
