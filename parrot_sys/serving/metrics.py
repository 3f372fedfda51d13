"""Metrics for Prometheus, named like vLLM's where vLLM has the same, so that its dashboards carry over.

Names, labels, types and buckets are those of `vllm/v1/metrics/loggers.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from parrot_sys.engine.requests import FinishReason
from parrot_sys.serving.driver import AnswerStream, EngineDriver, Piece
from parrot_sys.serving.engine_metrics import EngineCollector
from parrot_sys.serving.prompts import Prompt

_FIRST_TOKEN: tuple[float, ...] = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
)
_FIRST_TOKEN += (20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
_PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_REQUEST: tuple[float, ...] = (
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
    240.0,
    480.0,
)
_REQUEST += (960.0, 1920.0, 7680.0)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_HTTP = (0.1, 0.5, 1.0)
_PROBES = ("/health", "/metrics")
_CHOICES = (1, 2, 5, 10, 20)
_REASONS: dict[FinishReason, str] = {
    "stop": "stop",
    "length": "length",
    "cancelled": "abort",
    "expired": "abort",
    "error": "error",
}
"""vLLM's names of how answers end; it knows no deadlines."""


class Metrics:
    """Counters of the server, and those of the engine as they are when they are asked for."""

    def __init__(self, driver: EngineDriver, name: str, max_rows: int) -> None:
        """
        Args:
            driver: has the engine; tells of its steps from now on.
            name: of the model, a label of all of them.
            max_rows: longest request in rows, with its answer.
        """
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.registry.register(EngineCollector(driver, name))  # type: ignore[arg-type]
        self._name = name
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Rows of prompts that have run.").labels(name)
        self.generation_tokens = self._counter("vllm:generation_tokens", "Tokens of answers.").labels(name)
        self._ends = self._counter("vllm:request_success", "Answers by how they ended.", "finished_reason")
        for reason in _REASONS.values():
            self._ends.labels(name, reason)  # (a series from the start on, so that its first increase is seen)
        self._add_times()
        self._add_sizes(max_rows)
        self.http = self._counter("parrot:http_requests", "Answers by path and status.", "path", "status")
        self._add_http()
        driver.on_step = self.step_tokens.observe

    def _add_times(self) -> None:
        seconds, names = self._histogram, "vllm:request_{}_time_seconds"
        self.first_token = seconds("vllm:time_to_first_token_seconds", "From request to first token.", _FIRST_TOKEN)
        self.between = seconds("vllm:inter_token_latency_seconds", "From one token to the next.", _PER_TOKEN)
        about = "Mean time from one token of an answer to the next."
        self.per_token = seconds("vllm:request_time_per_output_token_seconds", about, _PER_TOKEN)
        self.whole = seconds("vllm:e2e_request_latency_seconds", "From request to last token.", _REQUEST)
        self.queue = seconds(names.format("queue"), "From the queue to the first step.", _REQUEST)
        self.prefill = seconds(names.format("prefill"), "From the first step to the first token.", _REQUEST)
        self.decode = seconds(names.format("decode"), "From the first token to the last.", _REQUEST)
        self.inference = seconds(names.format("inference"), "From the first step to the last token.", _REQUEST)

    def _add_sizes(self, max_rows: int) -> None:
        sizes, rows = self._histogram, _buckets(max_rows)
        self.prompt_sizes = sizes("vllm:request_prompt_tokens", "Rows of a prompt.", rows)
        self.answer_sizes = sizes("vllm:request_generation_tokens", "Tokens of an answer.", rows)
        about = "Tokens of the longest answer to a prompt."
        self.longest_answers = sizes("vllm:request_max_num_generation_tokens", about, rows)
        self.max_tokens = sizes("vllm:request_params_max_tokens", "Longest answer that was asked for.", rows)
        self.choices = sizes("vllm:request_params_n", "Answers to a prompt that were asked for.", _CHOICES)
        about = "Rows of prompts that a step completed, and tokens that it added to answers."
        self.step_tokens = sizes("vllm:iteration_tokens_total", about, _STEP_TOKENS)

    def _add_http(self) -> None:
        """Metrics of HTTP, which dashboards ask for without the name of a model."""
        labels, registry = ["method", "handler"], self.registry
        about = "Answers by route and class of status, without those about health and metrics."
        self.requests = Counter("http_requests", about, [*labels, "status"], registry=registry)
        about = "From request to the end of the answer."
        name, buckets = "http_request_duration_seconds", _HTTP
        self.durations = Histogram(name, about, labels, buckets=buckets, registry=registry)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(name, about, ["model_name", *labels], registry=self.registry)

    def _histogram(self, name: str, about: str, buckets: Iterable[float]) -> Histogram:
        made = Histogram(name, about, ["model_name"], buckets=tuple(buckets), registry=self.registry)
        return made.labels(self._name)

    def answers(self, start: float, prompt: Prompt, streams: Sequence[AnswerStream]) -> list[AnswerTimes]:
        """Measures the answers to a prompt.

        Args:
            start: `time.monotonic()` when its request came.
            prompt: that is answered.
            streams: of all its answers.
        """
        made: list[AnswerTimes] = []
        made += (AnswerTimes(self, start, prompt, stream, made) for stream in streams)
        return made

    def count_end(self, reason: FinishReason) -> None:
        """Counts an answer that has ended."""
        self._ends.labels(self._name, _REASONS[reason]).inc()

    def count_http(self, path: str, method: str, status: int, seconds: float) -> None:
        """Counts an answer.

        Args:
            path: of its route.
            method: of the request.
            status: of the answer.
            seconds: from request to the end of the answer.
        """
        self.http.labels(self._name, path, str(status)).inc()
        if path not in _PROBES:
            self.requests.labels(method, path, f"{status // 100}xx").inc()
            self.durations.labels(method, path).observe(seconds)

    def text(self) -> bytes:
        """All of them in the text form of Prometheus."""
        return generate_latest(self.registry)


class AnswerTimes:
    """Times of one answer."""

    def __init__(
        self, metrics: Metrics, start: float, prompt: Prompt, stream: AnswerStream, siblings: Sequence[AnswerTimes]
    ) -> None:
        """
        Args:
            metrics: take what is measured.
            start: of the request.
            prompt: that is answered.
            stream: of the answer.
            siblings: all answers to the prompt, this one among them.
        """
        self.tokens = 0
        """Tokens so far."""
        self.ended = False
        """Whether no more come."""
        self._metrics = metrics
        self._start = start
        self._prompt = prompt
        self._stream = stream
        self._siblings = siblings
        self._first: float | None = None
        self._last = start

    def take(self, piece: Piece) -> None:
        """Notes a piece."""
        metrics, delta = self._metrics, piece.delta
        if delta.tokens:
            if self._first is None:
                self._first = piece.time
                metrics.first_token.observe(piece.time - self._start)
            else:
                metrics.between.observe(piece.time - self._last)
            self._last = piece.time
            self.tokens += len(delta.tokens)
            metrics.generation_tokens.inc(len(delta.tokens))
        if piece.completes_prompt:
            metrics.prompt_tokens.inc(self._prompt.rows)
        if delta.finish_reason is not None:
            self._observe(piece.time)
            self.end(delta.finish_reason)

    def end(self, reason: FinishReason) -> None:
        """Counts the end of the answer, unless that was done."""
        if self.ended:
            return
        self.ended = True
        self._metrics.count_end(reason)
        if all(own.ended for own in self._siblings):
            self._metrics.choices.observe(len(self._siblings))
            self._metrics.longest_answers.observe(max(own.tokens for own in self._siblings))

    def _observe(self, end: float) -> None:
        """Notes what is known once the answer has ended at a time."""
        metrics, first, begun = self._metrics, self._first, self._stream.begun
        metrics.whole.observe(end - self._start)
        metrics.prompt_sizes.observe(self._prompt.rows)
        metrics.answer_sizes.observe(self.tokens)
        if limit := self._prompt.requests[0].max_new_tokens:
            metrics.max_tokens.observe(limit)
        if begun is not None:
            metrics.queue.observe(begun - self._stream.queued)
        if begun is not None and first is not None:
            metrics.prefill.observe(first - begun)
            metrics.decode.observe(self._last - first)
            metrics.inference.observe(self._last - begun)
            metrics.per_token.observe((self._last - first) / max(self.tokens - 1, 1))


def _buckets(most: int) -> list[int]:
    """1, 2, 5, 10, 20, ... up to `most`."""
    steps = (mantissa * 10**exponent for exponent in range(len(str(most))) for mantissa in (1, 2, 5))
    return [step for step in steps if step <= most]
