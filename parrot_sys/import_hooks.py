"""Functions that run once a module of another program was imported, so that nothing has to import it for them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_imported(module: str, function: str) -> None:
    """Calls a function after `module` was imported: at once if it has been, otherwise when somebody imports it.

    Args:
        module: name of the awaited module.
        function: `module:name` of a function without arguments; its module is imported for the call.
    """
    if module in sys.modules:
        _call(function)
        return
    if not (finders := [finder for finder in sys.meta_path if isinstance(finder, _Finder)]):
        finders = [_Finder()]
        sys.meta_path.insert(0, finders[0])
    finders[0].waiting.setdefault(module, []).append(function)


def _call(function: str) -> None:
    module, name = function.split(":")
    getattr(importlib.import_module(module), name)()


class _Finder(MetaPathFinder):
    """Finds the awaited modules as Python would without it, and has their loaders call what waits for them."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[str]] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of an awaited module, None for all others."""
        functions = self.waiting.pop(name, None)  # (gone first: the search below asks every finder again)
        if functions is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            self.waiting[name] = functions
            return spec
        execute = spec.loader.exec_module

        def execute_and_call(module: ModuleType) -> None:
            execute(module)
            for function in functions:
                _call(function)

        spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec
