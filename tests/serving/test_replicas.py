"""Metrics of several replicas as one text."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from parrot_sys.serving.replicas import joined_metrics


def _text(value: int) -> str:
    registry = CollectorRegistry()
    Gauge("plain", "Without labels.", registry=registry).set(value)
    Counter("vllm:labelled", "With one.", ["model_name"], registry=registry).labels("a b}").inc(10 * value)
    return generate_latest(registry).decode()


def test_each_value_keeps_its_replica() -> None:
    families = list(text_string_to_metric_families(joined_metrics([(0, _text(1)), (1, _text(2))])))
    names = [family.name for family in families]
    assert len(names) == len(set(names)), "the lines of a metric are together"
    found = {(own.name, own.labels["engine"]): own.value for family in families for own in family.samples}
    assert (found[("plain", "0")], found[("plain", "1")]) == (1, 2)
    assert (found[("vllm:labelled_total", "0")], found[("vllm:labelled_total", "1")]) == (10, 20)
    labels = [own.labels for family in families for own in family.samples if own.name == "vllm:labelled_total"]
    assert labels == [{"engine": str(number), "model_name": "a b}"} for number in range(2)]
