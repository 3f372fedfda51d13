"""Transformer Engine without its kernels: every name can be imported, and grouped linear layers hold their weights.

For code of others that imports Transformer Engine whether or not it uses it, and for what their modules save. Nothing
here computes. `install()` comes before the first import of Megatron-Core; use it in a process of its own.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import typing
from collections.abc import Sequence
from types import ModuleType
from typing import Any, ClassVar

import torch
import typing_extensions

PACKAGES = ("transformer_engine", "transformer_engine_torch")
VERSION = "2.9.0"


class _Any(type(torch.nn.Module)):  # type: ignore[misc]
    """Class of stubs: any attribute of one is another."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return stub(name)


def stub(name: str) -> Any:
    """A class that can be called, inherited from and asked for attributes."""
    return _Any(name, (torch.nn.Module,), {})


class GroupedLinear(torch.nn.Module):
    """Weights `weight0`, `weight1`, ... [out, in] of Transformer Engine's layer, cut over ranks by its caller."""

    def __init__(self, num_gemms: int, in_features: int, out_features: int, **settings: Any) -> None:
        super().__init__()
        size = settings.get("tp_size", 1)
        if settings.get("parallel_mode") == "column":
            out_features //= size
        elif settings.get("parallel_mode") == "row":
            in_features //= size
        self.num_gemms, self.use_bias = num_gemms, settings.get("bias", False)
        self.fp8_meta, self.fp8, self.fp8_calibration = {"fp8_checkpoint": False}, False, False
        dtype = settings.get("params_dtype") or torch.float32
        for index in range(num_gemms):
            weight = torch.nn.Parameter(torch.empty(out_features, in_features, dtype=dtype))
            self.register_parameter(f"weight{index}", weight)

    def get_extra_state(self) -> torch.Tensor:
        """Nothing, as without FP8."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Nothing to set."""


class _Module(ModuleType):
    __path__: ClassVar[list[str]] = []
    __version__ = VERSION

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return GroupedLinear if name == "GroupedLinear" else stub(name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = packages

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in self.packages:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing runs."""


def install(*others: str) -> None:
    """From now on Transformer Engine, and other packages for GPUs, can be imported in this process."""
    sys.meta_path.insert(0, _Finder((*PACKAGES, *others)))


def newer_typing() -> None:
    """Names of Python 3.12 that Megatron-LM 0.19 and Megatron-Bridge import, for Python 3.11."""
    if not hasattr(typing, "override"):
        typing.override = typing_extensions.override  # type: ignore[attr-defined]
