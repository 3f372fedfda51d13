"""RowGroups: decoded parts of column files, kept while there is room."""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

logger = logging.getLogger(__name__)
_CACHE_BYTES = 256 << 20
MakeRoom = Callable[[int], None]


class RowGroups:
    """Decoded row groups of all files, so many that they have no more bytes than a limit (or one that has more).

    One thread decodes at a time: that bounds the memory.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._warned = limit, False
        self.reset()

    def reset(self) -> None:
        """Forgets all. A forked process starts anew: another thread may have held the locks."""
        self._groups: OrderedDict[Hashable, Any] = OrderedDict()
        self._access, self._decoding = threading.Lock(), threading.Lock()

    def get(self, key: Hashable, name: str, decode: Callable[[MakeRoom], Any]) -> Any:
        """Result of `decode` for a key, as it is or as it was kept.

        Args:
            key: of file, content and row group.
            name: of the file, for messages.
            decode: calls what it is given with the size, then decodes. The result has `nbytes`.
        """
        if (found := self._known(key)) is not None:
            return found
        with self._decoding:
            if (found := self._known(key)) is None:
                found = decode(lambda size: self._make_room(size, name))
                with self._access:
                    self._groups[key] = found
            return found

    def _known(self, key: Hashable) -> Any:
        with self._access:
            if key in self._groups:
                self._groups.move_to_end(key)
            return self._groups.get(key)

    def _make_room(self, size: int, name: str) -> None:
        if size > self._limit and not self._warned:
            self._warned = True
            logger.warning(
                "%s has row groups of %.0f MB, and a whole one is decoded for each picture or record that is read: "
                "write it with smaller row groups (100 rows), or as tar files",
                *(name, size / 1e6),
            )
        with self._access:
            while self._groups and size + sum(column.nbytes for column in self._groups.values()) > self._limit:
                self._groups.popitem(last=False)


CACHE = RowGroups(_CACHE_BYTES)
os.register_at_fork(after_in_child=CACHE.reset)
