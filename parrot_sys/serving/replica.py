"""One copy of a model as a process of its own: its start, its log, its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from parrot_sys import platform
from parrot_sys.processes import end_with_parent

_CHUNK = 2**16
_LONGEST_LINE = 2**20
"""Bytes of a line of a log after which it is passed on in parts."""


@dataclass(kw_only=True)
class Replica:
    """One copy of the model."""

    number: int
    port: int | None = None
    """Where it listens; None until it is ready, and after its end."""
    load: int = 0
    """Requests that it answers."""
    failed: bool = False
    """Whether its last start has failed."""
    process: asyncio.subprocess.Process | None = None

    async def run(self, command: Sequence[str], on_ready: Callable[[], None]) -> int:
        """Starts it and passes its log on until it ends, for whatever reason; its exit code.

        Args:
            command: starts a server, which names its port in its log.
            on_ready: called once it has.
        """
        was_ready = False

        def take(line: bytes) -> None:
            nonlocal was_ready
            port = None if was_ready else port_of(line)
            if port is not None:
                self.port, self.failed, was_ready = port, False, True
                on_ready()

        device = ["--device", f"cuda:{self.number}"] if platform.cuda_available() else []
        try:
            self.process = await asyncio.create_subprocess_exec(
                *command, *device, stderr=asyncio.subprocess.PIPE, preexec_fn=end_with_parent
            )
            assert self.process.stderr is not None, "it was asked for"
            await _pass_on(self.process.stderr, take)
            return await self.process.wait()
        finally:
            self.port, self.failed = None, not was_ready
            self.ask_to_end()

    def ask_to_end(self) -> None:
        """Asks the process to end, if it runs."""
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()


def port_of(line: bytes) -> int | None:
    """Port that a line of a replica's log names; None for all other lines, whatever they are."""
    if not line.startswith(b"{"):
        return None
    try:
        facts = json.loads(line)
        return int(facts["url"].rsplit(":", 1)[1]) if facts["event"] == "ready" else None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return None


async def _pass_on(log: asyncio.StreamReader, take: Callable[[bytes], None]) -> None:
    """Writes a log to this process's own until its end; `take` gets each line."""
    rest = b""
    # In chunks: `readline` fails at long lines, and a writer whose log nobody reads waits for ever.
    while data := await log.read(_CHUNK):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            take(line)
        _write(b"".join(line + b"\n" for line in lines))
        if len(rest) > _LONGEST_LINE:
            _write(rest)
            rest = b""
    _write(rest)


def _write(data: bytes) -> None:
    with contextlib.suppress(OSError):  # a log that cannot be written keeps nobody from answering
        sys.stderr.write(data.decode(errors="replace"))
        sys.stderr.flush()
