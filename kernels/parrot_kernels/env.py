"""The environment variables of the project; the only place that reads os.environ (ENVs.md documents each)."""

from __future__ import annotations

import os

BACKENDS = ("auto", "cuda", "triton", "cpu", "reference")


def backend() -> str:
    """`PARROT_BACKEND`: the back end every op must use, or `auto`.

    Raises:
        ValueError: the variable names no back end.
    """
    value = os.environ.get("PARROT_BACKEND", "auto")
    if value not in BACKENDS:
        raise ValueError(f"PARROT_BACKEND must be one of {', '.join(BACKENDS)}, got {value!r}")
    return value


def triton_interpret() -> bool:
    """Whether `TRITON_INTERPRET` makes Triton run its kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def rank() -> int:
    """`RANK`: number of this process among those of its launcher; 0 without one."""
    return int(os.environ.get("RANK", 0))


def torchrun_id() -> str | None:
    """`TORCHELASTIC_RUN_ID`: of the run of torchrun that started this process, the same after restarts."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def show_traceback() -> bool:
    """`PARROT_TRACEBACK=1`: commands show the traceback of an error that the user can mend."""
    return os.environ.get("PARROT_TRACEBACK", "0") == "1"
