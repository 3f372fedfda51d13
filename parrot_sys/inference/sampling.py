"""From the logits of a step to the next token of each request."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parrot_sys.errors import ConfigError

_FLOAT32 = torch.finfo(torch.float32)


@dataclass(kw_only=True, frozen=True, slots=True)
class SamplingConfig:
    """Choice of the next token; greedy by default."""

    do_sample: bool = False
    """Draw from the distribution instead of taking the most likely token."""
    temperature: float = 1.0
    """Divides the logits before drawing; below 1 sharper."""
    top_k: int = 0
    """Draw among so many most likely tokens; 0 is all."""
    top_p: float = 1.0
    """Draw among the fewest most likely tokens that hold this much probability together."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens of prompt and answer less likely to come again (arXiv 1909.05858)."""

    def __post_init__(self) -> None:
        if not _is_positive(self.temperature):
            raise ConfigError(
                f"temperature must be > 0 and a finite float32, got {self.temperature}; for the most likely token set "
                "do_sample=False"
            )
        if self.top_k < 0:
            raise ConfigError(f"top_k must be >= 0 (0: all tokens), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be in (0, 1], got {self.top_p}")
        if not _is_positive(self.repetition_penalty):
            raise ConfigError(
                f"repetition_penalty must be > 0 and a finite float32 (1: none), got {self.repetition_penalty}"
            )


def _is_positive(value: float) -> bool:
    """Whether a number stays positive and finite in float32, in which it meets the logits; NaN does not."""
    return _FLOAT32.tiny <= value <= _FLOAT32.max


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits [S, vocabulary] of tokens marked in `seen` (bool) by `penalty`."""
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalized.clamp(_FLOAT32.min, _FLOAT32.max), logits)


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits [S, vocabulary] with -inf for tokens that `top_k` or, among the rest, `top_p` leaves out."""
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        dropped = probs.cumsum(-1) - probs >= top_p  # the first token that reaches top_p stays
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
    return logits


def next_tokens(
    logits: Tensor, config: SamplingConfig, seen: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    """Next token of each request.

    Args:
        logits: float32 [S, vocabulary], finite: see `generation.check_finite`.
        config: how to choose.
        seen: bool [S, vocabulary], tokens in prompt and answer so far; for a `repetition_penalty` only.
        generator: random numbers, on the device of the logits.

    Returns:
        int64 [S].
    """
    if config.repetition_penalty != 1:
        assert seen is not None, "a penalty needs the tokens so far"
        logits = penalize_repetition(logits, seen, config.repetition_penalty)
    if not config.do_sample:
        return logits.argmax(-1)
    # The largest becomes 0, so that no temperature makes it infinite.
    logits = (logits - logits.amax(-1, keepdim=True)) / config.temperature
    probs = filter_logits(logits, config.top_k, config.top_p).softmax(-1)
    return torch.multinomial(probs, 1, generator=generator).squeeze(1)
