"""Test modules here import Megatron at the top: the CPU layer has to come first."""

from __future__ import annotations

import parrot_sys.megatron  # noqa: F401
