"""One run at a time in an output directory."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path

from parrot_kernels import env
from parrot_sys.errors import ConfigError

logger = logging.getLogger(__name__)

_FILE = ".lock"
_POLL_SECONDS = 0.2
_PREDECESSOR_SECONDS = 120.0


class OutputLock:
    """A lock on a directory that this process holds until `release` or its end, however it ends.

    The operating system holds it (a POSIX record lock, also on network file systems), the file names who has it. So a
    file without a lock is stale, and forked processes do not inherit it. A process may lock a directory twice.
    """

    def __init__(self, folder: str | Path) -> None:
        """Locks `folder`, which is created if it does not exist.

        Raises:
            ConfigError: another process has it, or nothing can be written there.
        """
        self.path = Path(folder) / _FILE
        """File that names the holder."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"output must name a directory that can be written, but {self.path.parent} cannot: {error.strerror}; "
                "choose another one"
            ) from error
        self._lock(time.monotonic())
        if (holder := self._holder()) and holder.get("pid") != os.getpid():
            logger.info("%s: the lock of %s is stale and is taken over", self.path, _name(holder))
        self._write({"host": socket.gethostname(), "pid": os.getpid(), "run": env.torchrun_id()})

    def release(self) -> None:
        """Another process may have the directory; a second call does nothing."""
        if not self._file.closed:
            self._write({})
            self._file.close()

    def _lock(self, start: float) -> None:
        while True:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    logger.warning("%s cannot be locked (%s): start no second run there", self.path, error.strerror)
                    return
            holder = self._holder()
            # After a restart the processes of the same run may still be on their way out.
            same_run = env.torchrun_id() is not None and holder.get("run") == env.torchrun_id()
            if not same_run or time.monotonic() - start > _PREDECESSOR_SECONDS:
                self._file.close()
                raise ConfigError(
                    f"output {self.path.parent} is in use by {_name(holder)}: wait until that run ends, stop it, or "
                    "choose another output"
                )
            time.sleep(_POLL_SECONDS)

    def _holder(self) -> dict[str, object]:
        self._file.seek(0)
        try:
            holder = json.loads(self._file.read())
        except ValueError:
            return {}
        return holder if isinstance(holder, dict) else {}

    def _write(self, holder: dict[str, object]) -> None:
        try:
            self._file.seek(0)
            self._file.truncate()
            if holder:
                self._file.write(json.dumps(holder) + "\n")
            self._file.flush()
        except OSError as error:  # a full disk: the lock holds all the same
            logger.warning("%s cannot be written: %s", self.path, error.strerror)


def _name(holder: dict[str, object]) -> str:
    return f"process {holder.get('pid', 'unknown')} on host {holder.get('host', 'unknown')}"
