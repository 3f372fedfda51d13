"""Build backend: that of setuptools, which asks for torch, ninja and pybind11 only where C++ is compiled.

Without a compiler the packages are pure Python, and a build needs setuptools alone.
"""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "compiles",
    "find_cxx",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

_TO_COMPILE = ["ninja", "pybind11", "torch>=2.11"]


def find_cxx() -> str | None:
    """The C++ compiler: CXX, or c++/g++/clang++ on PATH; None where there is none. CXX insists on its own."""
    wished = os.environ.get("CXX")
    for name in [wished] if wished else ["c++", "g++", "clang++"]:
        if path := shutil.which(name.split()[0]):
            return " ".join([path, *name.split()[1:]])
    if wished:
        sys.exit(f"no C++ compiler ({wished}) found; on Debian or Ubuntu: apt-get install g++, or unset CXX")
    return None


def compiles() -> bool:
    """Whether the C++ modules are built: where a compiler is, unless PARROT_SKIP_EXTENSION=1; 0 insists."""
    wish = os.environ.get("PARROT_SKIP_EXTENSION", "auto")
    if wish not in ("auto", "0", "1"):
        sys.exit(f"PARROT_SKIP_EXTENSION must be 0, 1 or auto, got {wish!r}")
    if wish == "1":
        return False
    found = find_cxx() is not None
    if wish == "0" and not found:
        sys.exit("no C++ compiler (c++, g++, clang++) found; on Debian or Ubuntu: apt-get install g++")
    return found


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """Packages that a wheel is built with, beside setuptools."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *(_TO_COMPILE if compiles() else [])]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """The same for an editable installation."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *(_TO_COMPILE if compiles() else [])]
