"""Names of Python 3.12 that Megatron-LM 0.19 imports, for all processes of a program on Python 3.11."""

import typing

import typing_extensions

if not hasattr(typing, "override"):
    typing.override = typing_extensions.override  # type: ignore[attr-defined]
