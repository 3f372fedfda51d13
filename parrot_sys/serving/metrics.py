"""Metrics for Prometheus, named like vLLM's where vLLM has the same, so that its dashboards carry over."""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from parrot_sys.engine.core import Engine
from parrot_sys.serving.driver import EngineDriver, Piece

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 300)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


class Metrics:
    """Counters of the server, and those of the engine as they are when they are asked for."""

    def __init__(self, driver: EngineDriver, name: str) -> None:
        """
        Args:
            driver: has the engine.
            name: of the model, a label of all of them.
        """
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.registry.register(_EngineCollector(driver, name))  # type: ignore[arg-type]
        self._name = name
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Rows of prompts.").labels(name)
        self.generation_tokens = self._counter("vllm:generation_tokens", "Tokens of answers.").labels(name)
        self.successes = self._counter("vllm:request_success", "Answers that were completed.", "finished_reason")
        self.first_token = self._histogram("vllm:time_to_first_token_seconds", "From request to first token.", _SECONDS)
        self.between = self._histogram("vllm:inter_token_latency_seconds", "From one token to the next.", _SECONDS)
        self.whole = self._histogram("vllm:e2e_request_latency_seconds", "From request to last token.", _SECONDS)
        self.prompt_sizes = self._histogram("vllm:request_prompt_tokens", "Rows of a prompt.", _TOKENS)
        self.answer_sizes = self._histogram("vllm:request_generation_tokens", "Tokens of an answer.", _TOKENS)
        self.http = self._counter("parrot:http_requests", "Answers by path and status.", "path", "status")

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(name, about, ["model_name", *labels], registry=self.registry)

    def _histogram(self, name: str, about: str, buckets: Iterable[float]) -> Histogram:
        made = Histogram(name, about, ["model_name"], buckets=tuple(buckets), registry=self.registry)
        return made.labels(self._name)

    def answer(self) -> AnswerTimes:
        """Measures one answer from now on."""
        return AnswerTimes(self)

    def count_end(self, reason: str) -> None:
        """Counts an answer that has ended."""
        self.successes.labels(self._name, reason).inc()

    def count_http(self, path: str, status: int) -> None:
        """Counts an answer."""
        self.http.labels(self._name, path, str(status)).inc()

    def text(self) -> bytes:
        """All of them in the text form of Prometheus."""
        return generate_latest(self.registry)


class AnswerTimes:
    """Times of one answer."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._start = time.monotonic()
        self._last: float | None = None
        self._tokens = 0

    def take(self, piece: Piece, prompt_rows: int) -> None:
        """Notes a piece."""
        metrics, delta = self._metrics, piece.delta
        if self._last is None:
            metrics.first_token.observe(piece.time - self._start)
            metrics.prompt_tokens.inc(prompt_rows)
            metrics.prompt_sizes.observe(prompt_rows)
        elif delta.tokens:
            metrics.between.observe(piece.time - self._last)
        self._last = piece.time
        self._tokens += len(delta.tokens)
        metrics.generation_tokens.inc(len(delta.tokens))
        if delta.finish_reason is not None:
            metrics.whole.observe(piece.time - self._start)
            metrics.answer_sizes.observe(self._tokens)
            metrics.count_end(delta.finish_reason)


class _EngineCollector:
    """Counters of the engine; reads numbers only, which its thread may change meanwhile."""

    def __init__(self, driver: EngineDriver, name: str) -> None:
        self._driver = driver
        self._name = name

    def collect(self) -> Iterable[Metric]:
        """The metrics."""
        engine = self._driver.engine
        scheduler, pool, size = engine.scheduler, engine.pool, engine.config.block_size
        yield self._gauge("vllm:num_requests_running", "Requests in steps.", len(scheduler.running))
        yield self._gauge("vllm:num_requests_waiting", "Requests in the queue.", len(scheduler.waiting))
        yield self._gauge("parrot:num_requests_paused", "Answers whose readers are slow.", scheduler.num_paused)
        used = 1 - pool.num_free / pool.num_blocks
        yield self._gauge("vllm:kv_cache_usage_perc", "Part of the cache's blocks that requests hold.", used)
        yield self._gauge("parrot:engine_dead", "1 when the engine has failed.", int(self._driver.is_dead))
        yield self._counter("vllm:prefix_cache_queries", "Rows looked for in the cache.", pool.queries * size)
        yield self._counter("vllm:prefix_cache_hits", "Rows found in the cache.", pool.hits * size)
        yield self._counter("vllm:num_preemptions", "Requests that had to wait again.", scheduler.num_preemptions)
        yield self._counter("parrot:engine_steps", "Steps of the engine.", engine.steps)
        yield from self._pictures(engine)

    def _pictures(self, engine: Engine) -> Iterable[Metric]:
        cache = engine.cache
        yield self._counter("parrot:pictures_encoded", "Pictures that the tower ran on.", cache.pictures_encoded)
        hits = CounterMetricFamily("parrot:picture_cache_hits", "Hits by cache.", labels=["model_name", "cache"])
        misses = CounterMetricFamily("parrot:picture_cache_misses", "Misses by cache.", labels=["model_name", "cache"])
        held = GaugeMetricFamily("parrot:picture_cache_bytes", "Bytes by cache.", labels=["model_name", "cache"])
        for name, own in (("features", cache.features), ("routed", cache.routed)):
            hits.add_metric([self._name, name], own.counts.hits)
            misses.add_metric([self._name, name], own.counts.misses)
            held.add_metric([self._name, name], own.num_bytes)
        yield from (hits, misses, held)

    def _gauge(self, name: str, about: str, value: float) -> Metric:
        metric = GaugeMetricFamily(name, about, labels=["model_name"])
        metric.add_metric([self._name], value)
        return metric

    def _counter(self, name: str, about: str, value: float) -> Metric:
        metric = CounterMetricFamily(name, about, labels=["model_name"])
        metric.add_metric([self._name], value)
        return metric
