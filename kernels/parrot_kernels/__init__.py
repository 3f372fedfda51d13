"""parrot_kernels: raw forward and backward launchers, one folder per op. Imports no triton and no C++ extension."""

from __future__ import annotations

__version__ = "0.2.0"
__all__ = ["__version__"]
