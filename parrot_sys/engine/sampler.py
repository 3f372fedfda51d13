"""From the logits of a step to the next token of each request: every request by its own settings, all in one batch.

S requests, V tokens of the vocabulary. A request's token does not depend on the others: what is computed for all of
them goes row by row, and each draws from its own random numbers. The order of the changes is that of transformers:
repetition penalty, temperature, top-k, top-p, min-p; the penalties of the OpenAI interface come after the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parrot_sys.errors import ConfigError

_FLOAT32 = torch.finfo(torch.float32)


@dataclass(kw_only=True, frozen=True, slots=True)
class SamplingParams:
    """Choice of the next token; greedy by default."""

    temperature: float = 0.0
    """Divides the logits before a token is drawn; below 1 sharper. 0 takes the most likely token."""
    top_k: int = 0
    """Draw among so many most likely tokens; 0 is all."""
    top_p: float = 1.0
    """Draw among the fewest most likely tokens that hold this much probability together."""
    min_p: float = 0.0
    """Draw among tokens at least this many times as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens of prompt and answer less likely to come again (arXiv 1909.05858)."""
    presence_penalty: float = 0.0
    """Taken from the logit of each token that the answer has."""
    frequency_penalty: float = 0.0
    """Taken from the logit of each token of the answer, as often as the answer has it."""
    seed: int | None = None
    """Seed of the request's own random numbers; None takes a new one from torch's state."""

    def __post_init__(self) -> None:
        if self.temperature != 0 and not _is_positive(self.temperature):
            raise ConfigError(
                f"temperature must be > 0 and a finite float32, or 0 for the most likely token, got {self.temperature}"
            )
        if self.top_k < 0:
            raise ConfigError(f"top_k must be >= 0 (0: all tokens), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p must be in [0, 1], got {self.min_p}")
        if not _is_positive(self.repetition_penalty):
            raise ConfigError(
                f"repetition_penalty must be > 0 and a finite float32 (1: none), got {self.repetition_penalty}"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not abs(value := getattr(self, name)) <= _FLOAT32.max:
                raise ConfigError(f"{name} must be a finite float32 (0: none), got {value}")

    @property
    def penalizes(self) -> bool:
        """Whether earlier tokens change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _is_positive(value: float) -> bool:
    """Whether a number stays positive and finite in float32, in which it meets the logits; NaN does not."""
    return _FLOAT32.tiny <= value <= _FLOAT32.max


class RequestSampler:
    """Settings of one request and its state from token to token: random numbers, and the tokens so far."""

    def __init__(
        self, params: SamplingParams, prompt: Iterable[int], vocab_size: int, *, device: torch.device | str = "cpu"
    ) -> None:
        """
        Args:
            params: settings.
            prompt: ids of the prompt; negative ones (images) are left out.
            vocab_size: V.
            device: of the logits.
        """
        self.params = params
        self.changes = params.penalizes
        """Whether earlier tokens change its logits."""
        self.generator: torch.Generator | None = None
        if params.temperature:
            seed = int(torch.randint(2**62, ())) if params.seed is None else params.seed
            self.generator = torch.Generator(device).manual_seed(seed)
        self.in_prompt: Tensor | None = None
        self.counts: Tensor | None = None
        """float32 [V], how often the answer has each token; with a penalty only."""
        if self.changes:
            self.in_prompt = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.in_prompt[[token for token in prompt if token >= 0]] = True
            self.counts = torch.zeros(vocab_size, device=device)

    def note(self, token: int) -> None:
        """Counts a token of the answer."""
        if self.counts is not None:
            self.counts[token] += 1


def next_tokens(logits: Tensor, samplers: Sequence[RequestSampler]) -> Tensor:
    """Next token of each request; `RequestSampler.note` is left to the caller.

    Args:
        logits: float32 [S, V], finite; not changed.
        samplers: of the S requests.

    Returns:
        int64 [S].
    """
    penalized = [row for row, own in enumerate(samplers) if own.changes]
    if penalized:
        rows = torch.tensor(penalized, device=logits.device)
        changed = penalize(logits.index_select(0, rows), [samplers[row] for row in penalized])
        logits = logits.index_copy(0, rows, changed)
    tokens = logits.argmax(-1)
    drawing = [row for row, own in enumerate(samplers) if own.generator is not None]
    if drawing:
        rows = torch.tensor(drawing, device=logits.device)
        tokens[rows] = _draw(logits.index_select(0, rows), [samplers[row] for row in drawing])
    return tokens


def penalize(logits: Tensor, samplers: Sequence[RequestSampler]) -> Tensor:
    """Logits [S, V] less those of tokens that came before, by the penalties of each of the S requests."""
    params = [own.params for own in samplers]
    repetition = _column([own.repetition_penalty for own in params], logits)
    in_prompt = torch.stack([own.in_prompt for own in samplers if own.in_prompt is not None])
    counts = torch.stack([own.counts for own in samplers if own.counts is not None])
    assert len(counts) == len(samplers), "requests with a penalty count their tokens"
    in_answer = counts > 0
    divided = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where((in_prompt | in_answer) & (repetition != 1), divided, logits)
    logits = logits - counts * _column([own.frequency_penalty for own in params], logits)
    logits = logits - in_answer * _column([own.presence_penalty for own in params], logits)
    return logits.clamp(_FLOAT32.min, _FLOAT32.max)


def _draw(logits: Tensor, samplers: Sequence[RequestSampler]) -> Tensor:
    """A token of each request that draws, int64 [S]: what `torch.multinomial` draws for each alone."""
    params = [own.params for own in samplers]
    # The largest becomes 0, so that no temperature makes it infinite.
    logits = (logits - logits.amax(-1, keepdim=True)) / _column([own.temperature for own in params], logits)
    probs = filter_logits(logits, params).softmax(-1)
    waits = torch.empty_like(probs)
    for row, own in zip(waits, samplers, strict=True):
        row.exponential_(generator=own.generator)
    return probs.div_(waits).argmax(-1)


def filter_logits(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Logits [S, V] with -inf for tokens that a request's top-k leaves out or, among the rest, top-p or min-p."""
    size = logits.shape[-1]
    if not any(0 < own.top_k < size or own.top_p < 1 or own.min_p > 0 for own in params):
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    last = [min(own.top_k or size, size) - 1 for own in params]
    threshold = ordered.gather(1, torch.tensor(last, device=logits.device)[:, None])
    ordered = ordered.masked_fill(ordered < threshold, -torch.inf)
    probs = ordered.softmax(-1)
    # The first token that reaches top_p stays; 1 leaves nothing out, whatever the sum is rounded to.
    top_p = _column([own.top_p if own.top_p < 1 else torch.inf for own in params], logits)
    dropped = (probs.cumsum(-1) - probs >= top_p) | (ordered < threshold)
    dropped |= probs < probs[:, :1] * _column([own.min_p for own in params], logits)
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a token after the rows before it, as the model has it: without temperature and penalties."""

    token: int
    logprob: float
    is_greedy: bool
    """Whether no token is more likely."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens, as many as were asked for, the most likely first."""


def token_logprobs(logits: Tensor, tokens: Sequence[int], top: Sequence[int]) -> list[TokenLogprob]:
    """Log-probabilities of given tokens.

    Args:
        logits: float32 [S, V].
        tokens: of each row.
        top: how many of the most likely tokens each row wants.
    """
    if not tokens:
        return []
    chosen = torch.tensor(tokens, device=logits.device)[:, None]
    own = logits.gather(1, chosen).squeeze(1)
    greedy = (own >= logits.amax(-1)).tolist()
    # The whole [S, V] of log-probabilities is not needed: a row's differ from its logits by one number.
    normalizer = logits.logsumexp(-1)
    values = (own - normalizer).tolist()
    best: list[list[int]] = [[]] * len(tokens)
    best_values: list[list[float]] = [[]] * len(tokens)
    if most := min(max(top), logits.shape[-1]):
        largest = logits.topk(most, dim=-1)
        best, best_values = largest.indices.tolist(), (largest.values - normalizer[:, None]).tolist()
    return [
        TokenLogprob(token, value, is_greedy, tuple(zip(ids[:count], logprobs[:count], strict=True)))
        for token, value, is_greedy, ids, logprobs, count in zip(
            tokens, values, greedy, best, best_values, top, strict=True
        )
    ]
