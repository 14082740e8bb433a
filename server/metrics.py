"""Prometheus metrics: vLLM's names, so that its dashboards work, and what only Octavo has.

Label values come from fixed sets, never from a request. Knows nothing about HTTP bodies.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.request import FinishReason, Request, TextDelta

if TYPE_CHECKING:
    from engine.stats import EngineStats
    from server.lifecycle import Lifecycle

_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
           1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)  # fmt: skip
_ITL_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_E2E_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000)
_CHOICES = (1, 2, 5, 10, 20, 50, 100)
_LAG_S = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5)
_LABELS = ("model_name", "engine")

# name, help, buckets; each has vLLM's labels.
_HISTOGRAMS = (
    ("vllm:time_to_first_token_seconds", "From arrival to the first token of a choice", _TTFT_S),
    ("vllm:inter_token_latency_seconds", "Time a token between two deltas of a choice", _ITL_S),
    ("vllm:request_time_per_output_token_seconds", "Mean time a token after the first, a choice", _ITL_S),
    ("vllm:e2e_request_latency_seconds", "From arrival to the end of a choice", _E2E_S),
    ("vllm:request_prompt_tokens", "Prompt tokens of a request", _TOKENS),
    ("vllm:request_generation_tokens", "Output tokens of a choice", _TOKENS),
    ("vllm:request_params_n", "The n of a request", _CHOICES),
    ("vllm:request_params_max_tokens", "The max_tokens of a request that set it", _TOKENS),
)


class Metrics:
    """One registry a server. Request metrics are observed from the event loop only."""

    def __init__(self, lifecycle: Lifecycle, model_name: str | None = None) -> None:
        self.registry = CollectorRegistry()
        self._lifecycle = lifecycle
        self._model_name = model_name
        self._histograms = {
            name: Histogram(name, help, _LABELS, buckets=buckets, registry=self.registry)
            for name, help, buckets in _HISTOGRAMS
        }
        self._observed: dict[str, Histogram] = {}  # with their labels: looking those up costs more than observing
        self._success = Counter(
            "vllm:request_success", "Ended choices", (*_LABELS, "finished_reason"), registry=self.registry
        )
        self._http = Counter("octavo_http_responses", "HTTP answers", ("status",), registry=self.registry)
        self._retries = Counter("octavo_client_retries", "Requests that a client sent again", registry=self.registry)
        self._lag = Histogram(
            "octavo_event_loop_lag_seconds", "Delay of a timer", buckets=_LAG_S, registry=self.registry
        )
        self.registry.register(_EngineCollector(lifecycle, self.labels))

    def labels(self) -> list[str]:
        engine = self._lifecycle.engine
        return [self._model_name or (engine.model_name if engine else ""), "0"]

    def observe(self, name: str, value: float) -> None:
        if name not in self._observed:
            self._observed[name] = self._histograms[f"vllm:{name}"].labels(*self.labels())
        self._observed[name].observe(value)

    def ended(self, reason: FinishReason) -> None:
        self._success.labels(*self.labels(), reason.value).inc()

    def answered(self, status: int, is_retry: bool) -> None:
        self._http.labels(str(status)).inc()
        if is_retry:
            self._retries.inc()

    def lagged(self, lag_s: float) -> None:
        self._lag.observe(lag_s)

    def exposition(self) -> bytes:
        """Prometheus' text format 0.0.4."""
        return generate_latest(self.registry)


class ChoiceTimer:
    """Observes one choice from its first delta to its end."""

    def __init__(self, metrics: Metrics, arrival_s: float) -> None:
        self._metrics = metrics
        self._arrival_s = arrival_s
        self._first_s: float | None = None
        self._last_s = arrival_s
        self._num_tokens = 0

    def delta(self, delta: TextDelta) -> None:
        now_s, count = time.monotonic(), len(delta.token_ids)
        if count and self._first_s is None:
            self._metrics.observe("time_to_first_token_seconds", now_s - self._arrival_s)
            self._first_s = self._last_s = now_s
        elif count:
            self._metrics.observe("inter_token_latency_seconds", (now_s - self._last_s) / count)
            self._last_s = now_s
        self._num_tokens += count
        if delta.finish_reason is not None:
            self.end(delta.finish_reason)

    def end(self, reason: FinishReason) -> None:
        self._metrics.ended(reason)
        if reason not in (FinishReason.STOP, FinishReason.LENGTH):
            return
        self._metrics.observe("e2e_request_latency_seconds", time.monotonic() - self._arrival_s)
        self._metrics.observe("request_generation_tokens", self._num_tokens)
        if self._first_s is not None and self._num_tokens > 1:
            per_token_s = (self._last_s - self._first_s) / (self._num_tokens - 1)
            self._metrics.observe("request_time_per_output_token_seconds", per_token_s)


def observe_request(metrics: Metrics, request: Request) -> None:
    metrics.observe("request_prompt_tokens", len(request.prompt_token_ids))
    metrics.observe("request_params_n", request.params.n)
    if request.params.max_tokens is not None:
        metrics.observe("request_params_max_tokens", request.params.max_tokens)


# Name, help, and the field of `EngineStats`; the first table holds gauges, the second counters.
_GAUGES = (
    ("vllm:num_requests_running", "Sequences in the running batch", "num_running"),
    ("vllm:num_requests_waiting", "Sequences that wait to be scheduled", "num_waiting"),
    ("vllm:kv_cache_usage_perc", "KV pages in use, 1 is all", "kv_usage"),
    ("octavo_last_step_age_seconds", "Since the last committed step; 0 when idle", "last_step_age_s"),
)
_COUNTERS = (
    ("vllm:num_preemptions", "Preemptions", "num_preemptions"),
    ("vllm:prompt_tokens", "Prompt tokens taken in", "prompt_tokens"),
    ("vllm:generation_tokens", "Tokens generated", "generation_tokens"),
    ("vllm:spec_decode_num_draft_tokens", "Tokens that speculation proposed", "draft_tokens"),
    ("vllm:spec_decode_num_accepted_tokens", "Proposed tokens that were accepted", "accepted_draft_tokens"),
    ("octavo_texts", "Texts embedded or scored; by octavo_steps, texts a step", "texts"),
    ("vllm:prefix_cache_queries", "Tokens looked up in the prefix cache", "prefix_queries_tokens"),
    ("vllm:prefix_cache_hits", "Tokens found in the prefix cache", "prefix_hits_tokens"),
    ("octavo_compiles", "XLA compilations", "compiles"),
    ("octavo_compile_seconds", "Time spent in XLA compilations", "compile_s"),
    ("octavo_compiles_after_ready", "XLA compilations while serving; must stay 0", "compiles_after_ready"),
    ("octavo_tokens_used", "Token positions that steps computed for a request", "tokens_used"),
    ("octavo_device_flops", "FLOPs of products on one device, estimated from shapes", "flops"),
    ("octavo_device_memory_bytes", "Bytes that one device read and wrote, estimated from shapes", "memory_bytes"),
    ("octavo_tokens_padded", "Token positions that buckets added", "tokens_padded"),
)


class _EngineCollector(Collector):
    """Turns the engine's snapshot into metrics when somebody scrapes."""

    def __init__(self, lifecycle: Lifecycle, labels: Callable[[], list[str]]) -> None:
        self._lifecycle = lifecycle
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        engine = self._lifecycle.engine
        ready = GaugeMetricFamily("octavo_ready", "1 when requests are served")
        ready.add_metric([], float(self._lifecycle.status == "ready" and self._lifecycle.alive))
        yield ready
        if engine is not None:
            yield from _families(engine.stats(), self._labels())


def _families(stats: EngineStats, labels: list[str]) -> Iterator[Metric]:
    for name, help, field in _GAUGES:
        gauge = GaugeMetricFamily(name, help, labels=_LABELS)
        gauge.add_metric(labels, getattr(stats, field))
        yield gauge
    for name, help, field in _COUNTERS:
        counter = CounterMetricFamily(name, help, labels=_LABELS)
        counter.add_metric(labels, getattr(stats, field))
        yield counter
    for name, help, label, values in (
        ("octavo_steps", "Device calls by program", "bucket", stats.steps),
        (
            "octavo_step_seconds",
            "Time of device calls, from when each could start to its result",
            "bucket",
            stats.step_s,
        ),
        ("octavo_loop_seconds", "Time of the engine's thread by phase of a step", "phase", stats.phase_s),
    ):
        counter = CounterMetricFamily(name, help, labels=(*_LABELS, label))
        for value, number in values.items():
            counter.add_metric([*labels, value], number)
        yield counter
    if stats.expert_tokens is not None:
        yield from _expert_families(stats.expert_tokens, labels)


def _expert_families(tokens: np.ndarray, labels: list[str]) -> Iterator[Metric]:
    """tokens: int64 [layers, experts]. A sample an expert and one a layer; their product would be thousands."""
    chosen = CounterMetricFamily(
        "octavo_expert_tokens", "Tokens that chose an expert, all layers together", labels=(*_LABELS, "expert")
    )
    for expert, count in enumerate(tokens.sum(axis=0)):
        chosen.add_metric([*labels, str(expert)], int(count))
    yield chosen
    busiest = GaugeMetricFamily(
        "octavo_expert_imbalance",
        "Tokens of a layer's busiest expert by the mean of its experts; 1 is even",
        labels=(*_LABELS, "expert_layer"),
    )
    for layer, counts in enumerate(tokens):
        busiest.add_metric([*labels, str(layer)], float(counts.max() / max(counts.mean(), 1e-9)))
    yield busiest
