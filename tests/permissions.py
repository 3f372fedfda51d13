"""Permissions of files that root respects as well: the thread gives up the capabilities to pass over them."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

_VERSION = 0x20080522  # of the structures below, from linux/capability.h
_DAC_OVERRIDE, _DAC_READ_SEARCH = 1, 2


@contextlib.contextmanager
def permissions_count() -> Iterator[None]:
    """Within the block a file that may not be read or written by its owner is not, whoever runs the tests."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_VERSION, 0)
    saved = (ctypes.c_uint32 * 6)()
    _check(libc.capget(header, saved))
    fewer = (ctypes.c_uint32 * 6)(*saved)
    fewer[0] &= ~(1 << _DAC_OVERRIDE | 1 << _DAC_READ_SEARCH)  # the effective ones
    _check(libc.capset(header, fewer))
    try:
        yield
    finally:
        _check(libc.capset(header, saved))


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), "capabilities cannot be changed")


@contextlib.contextmanager
def mode(path: Path, bits: int) -> Iterator[None]:
    """A file or folder with other permissions within the block."""
    before = path.stat().st_mode
    path.chmod(bits)
    try:
        with permissions_count():
            yield
    finally:
        path.chmod(before)
