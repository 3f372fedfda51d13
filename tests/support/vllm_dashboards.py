"""What vLLM's dashboards for Grafana ask for (Apache-2.0, github.com/vllm-project/vllm, examples/observability).

Of expressions that only differ in a quantile, a range or how they are summed, one is kept.
"""

from __future__ import annotations

import re

_RATE = '{model_name="$model_name"}[$__rate_interval]'
_HISTOGRAMS = ("e2e_request_latency_seconds", "inter_token_latency_seconds", "time_to_first_token_seconds")

EXPRESSIONS = (
    # prometheus_grafana/grafana.json
    *(f"histogram_quantile(0.99, sum by(le) (rate(vllm:{name}_bucket{_RATE})))" for name in _HISTOGRAMS),
    *(f"rate(vllm:{name}_sum{_RATE}) / rate(vllm:{name}_count{_RATE})" for name in _HISTOGRAMS),
    f"rate(vllm:prompt_tokens_total{_RATE})",
    f"rate(vllm:generation_tokens_total{_RATE})",
    'vllm:num_requests_running{model_name="$model_name"}',
    'vllm:num_requests_waiting{model_name="$model_name"}',
    'vllm:kv_cache_usage_perc{model_name="$model_name"}',
    f"sum by(le) (increase(vllm:request_prompt_tokens_bucket{_RATE}))",
    f"sum by(le) (increase(vllm:request_generation_tokens_bucket{_RATE}))",
    f"sum by(finished_reason) (increase(vllm:request_success_total{_RATE}))",
    f"rate(vllm:request_queue_time_seconds_sum{_RATE})",
    f"rate(vllm:request_prefill_time_seconds_sum{_RATE})",
    f"rate(vllm:request_decode_time_seconds_sum{_RATE})",
    f"rate(vllm:request_max_num_generation_tokens_sum{_RATE})",
    # dashboards/grafana/query_statistics.json
    f"sum by (model_name) (rate(vllm:request_success_total{_RATE}))",
    f"sum(rate(vllm:prompt_tokens_total{_RATE})) / sum(rate(vllm:request_success_total{_RATE}))",
    f"histogram_quantile(0.90, sum by(le, model_name) (rate(vllm:request_prompt_tokens_bucket{_RATE})))",
    # dashboards/grafana/vllm_overview.json
    'sum(rate(http_requests_total{status="5xx"}[$__rate_interval])) / sum(rate(http_requests_total[$__range]))',
    "sum by (handler) (rate(http_request_duration_seconds_sum[$__range]))",
    "sum by (handler) (rate(http_request_duration_seconds_count[$__range]))",
    'sum(rate(vllm:request_success_total{finished_reason="error"}[$__rate_interval]))',
    'sum(rate(vllm:time_to_first_token_seconds_bucket{le="0.5"}[$__rate_interval]))',
    'sum(rate(vllm:request_time_per_output_token_seconds_bucket{le="0.1"}[$__rate_interval]))',
    f"sum(rate(vllm:num_preemptions_total{_RATE}))",
    f"sum(rate(vllm:prefix_cache_hits_total{_RATE})) / (sum(rate(vllm:prefix_cache_queries_total{_RATE})) > 0)",
    f"sum(rate(vllm:mm_cache_hits_total{_RATE})) / (sum(rate(vllm:mm_cache_queries_total{_RATE})) > 0)",
    f"sum(rate(vllm:external_prefix_cache_hits_total{_RATE}))",
    f"sum(rate(vllm:external_prefix_cache_queries_total{_RATE}))",
    'sum(vllm:num_requests_waiting_by_reason{model_name="$model_name", reason="capacity"})',
    'sum(vllm:num_requests_waiting_by_reason{model_name="$model_name", reason="deferred"})',
    f"histogram_quantile(0.5, sum by (le) (rate(vllm:iteration_tokens_total_bucket{_RATE})))",
    'sum(rate(vllm:prompt_tokens_by_source_total{source="local_cache_hit"}[$__rate_interval]))',
)

NOT_SERVED = {
    "vllm:external_prefix_cache_hits_total": "no cache is shared between servers",
    "vllm:external_prefix_cache_queries_total": "no cache is shared between servers",
    "vllm:prompt_tokens_by_source_total": "prefix_cache_hits has found rows, also of requests that start again",
}
"""Names of the expressions that the server has no metric for, and why."""

HISTOGRAMS = (
    "vllm:request_inference_time_seconds",
    "vllm:request_time_per_output_token_seconds",
    "vllm:request_params_max_tokens",
    "vllm:request_params_n",
)
"""Histograms that vLLM serves besides (`vllm/v1/metrics/loggers.py`), as dashboards of others ask for them."""


def asked_for(expression: str) -> tuple[set[str], set[str]]:
    """Names of the samples of an expression, and of the labels that they must have."""
    names = set(re.findall(r"(?:vllm:|http_)\w+", expression))
    labels = set(re.findall(r"[{,]\s*(\w+)=", expression))
    for group in re.findall(r"\bby\s*\(([^)]*)\)", expression):
        labels |= {label.strip() for label in group.split(",")}
    return names, labels
