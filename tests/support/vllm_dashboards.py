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
)

HISTOGRAMS = (
    "vllm:request_inference_time_seconds",
    "vllm:request_time_per_output_token_seconds",
    "vllm:iteration_tokens_total",
    "vllm:request_params_max_tokens",
    "vllm:request_params_n",
)
"""Histograms that vLLM serves besides (`vllm/v1/metrics/loggers.py`), as dashboards of others ask for them."""


def asked_for(expression: str) -> tuple[set[str], set[str]]:
    """Names of the samples of an expression, and of the labels that they must have."""
    names = set(re.findall(r"vllm:\w+", expression))
    labels = set(re.findall(r"[{,]\s*(\w+)=", expression))
    for group in re.findall(r"\bby\s*\(([^)]*)\)", expression):
        labels |= {label.strip() for label in group.split(",")}
    return names, labels
