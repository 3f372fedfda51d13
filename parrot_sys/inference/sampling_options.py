"""Keywords of `generate` that choose tokens, named as those of transformers."""

from __future__ import annotations

from typing import TypedDict

from parrot_sys.engine.sampler import SamplingParams
from parrot_sys.errors import ConfigError


class SamplingOptions(TypedDict, total=False):
    """How `generate` chooses the next token; None takes the default of `SamplingParams`."""

    do_sample: bool
    """Draw tokens; otherwise the most likely one is taken, whatever the others say."""
    temperature: float | None
    """Above 0; 1 when None."""
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    num_beams: int
    """1 only, for calls written for the released code."""


def sampling_params(
    *,
    do_sample: bool = False,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    num_beams: int = 1,
) -> SamplingParams:
    """The engine's settings for options of `generate` (see `SamplingOptions`).

    Raises:
        ConfigError: an option is out of its range, or two contradict each other.
    """
    if num_beams != 1:
        raise ConfigError(f"num_beams must be 1, got {num_beams}")
    if do_sample and temperature == 0:
        raise ConfigError("temperature must be > 0 to draw, got 0; for the most likely token set do_sample=False")
    given = {
        "temperature": (1.0 if temperature is None else temperature) if do_sample else 0.0,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
