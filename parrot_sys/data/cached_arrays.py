"""Arrays kept on disk that can be computed again: written whole or not at all, with a checksum."""

from __future__ import annotations

import logging
import uuid
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

logger = logging.getLogger(__name__)


def write_array(path: Path, values: npt.NDArray[Any]) -> None:
    """Writes an array; several processes may do this at once, each the same.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}-{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            np.save(file, values)
            np.save(file, np.uint32(zlib.crc32(values.data)))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_array(path: Path, dtype: type[np.generic]) -> npt.NDArray[Any] | None:
    """The array that `write_array` wrote; None without a file, and (with a warning) for a damaged or another one."""
    try:
        with path.open("rb") as file:
            values, checksum = np.load(file, allow_pickle=False), np.load(file, allow_pickle=False)
    except FileNotFoundError:
        return None
    except Exception as error:  # (of a damaged header, numpy raises what its parser happens to raise)
        logger.warning("%s is damaged (%s); it is made anew", path, error)
        return None
    if values.dtype != dtype or zlib.crc32(np.ascontiguousarray(values).data) != checksum:
        logger.warning("%s is damaged; it is made anew", path)
        return None
    return np.asarray(values)
