"""Metrics of the engine, read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from parrot_sys.engine.core import Engine
from parrot_sys.serving.driver import EngineDriver


class EngineCollector:
    """Counters of the engine; reads numbers only, which its thread may change meanwhile."""

    def __init__(self, driver: EngineDriver, name: str) -> None:
        """
        Args:
            driver: has the engine.
            name: of the model, a label of all of them.
        """
        self._driver = driver
        self._name = name

    def collect(self) -> Iterable[Metric]:
        """The metrics."""
        engine = self._driver.engine
        scheduler, pool, size = engine.scheduler, engine.pool, engine.config.block_size
        yield self._gauge("vllm:num_requests_running", "Requests in steps.", len(scheduler.running))
        yield self._gauge("vllm:num_requests_waiting", "Requests in the queue.", len(scheduler.waiting))
        reasons = {"capacity": len(scheduler.waiting), "deferred": scheduler.num_paused}
        waiting = GaugeMetricFamily(
            "vllm:num_requests_waiting_by_reason",
            "Requests that wait for room, and answers whose readers are slow.",
            labels=["model_name", "reason"],
        )
        for reason, count in reasons.items():
            waiting.add_metric([self._name, reason], count)
        yield waiting
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
        counts = cache.features.counts
        yield self._counter("vllm:mm_cache_queries", "Pictures looked for in the cache.", counts.hits + counts.misses)
        yield self._counter("vllm:mm_cache_hits", "Pictures whose features were in the cache.", counts.hits)
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
