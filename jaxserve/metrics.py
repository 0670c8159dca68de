"""The numbers behind /metrics, under the names that SGLang's dashboards read.

One registry per app, none global. The engine's counts are read when a scrape asks for them; latency
histograms are fed by the HTTP side as tokens pass. Knows nothing of HTTP, of queues or of devices.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.utils import floatToGoString

from jaxserve.types import QUEUE_TIME_BUCKETS_S, EngineInfo, EngineStats

# Seconds. A TPU's first token comes in milliseconds, a laptop's may take a minute.
FIRST_TOKEN_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.2, 0.4, 0.6, 0.8),
    *(1, 2, 4, 6, 8, 10, 20, 40, 60, 80, 120, 300),
)
NEXT_TOKEN_BUCKETS_S = (
    *(0.0001, 0.00025, 0.0005, 0.00075),
    *(0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.05, 0.06),
    *(0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2, 5, 10),
)
REQUEST_BUCKETS_S = (
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.2,
    0.4,
    0.8,
    1,
    2,
    5,
    10,
    20,
    40,
    60,
    100,
    200,
    400,
    600,
    1200,
    1800,
)
TOKEN_COUNT_BUCKETS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


class EngineView(Protocol):
    """What an engine says of itself. Read per scrape."""

    @property
    def info(self) -> EngineInfo | None: ...
    @property
    def stats(self) -> EngineStats: ...
    @property
    def heartbeat_age_s(self) -> float: ...


class ServerMetrics:
    """All series of one app. Those of several engines are told apart by a label, dp_rank."""

    def __init__(self, model_name: str, engines: Sequence[EngineView]):
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(model_name, engines))
        self._model_name = model_name
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "Time to first token.", FIRST_TOKEN_BUCKETS_S
        )
        self._next_token = _TokenTimes(model_name)
        self._registry.register(self._next_token)
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds",
            "Time of a request per output token after the first.",
            NEXT_TOKEN_BUCKETS_S,
        )
        self._request = self._histogram(
            "e2e_request_latency_seconds", "Time from request to last token.", REQUEST_BUCKETS_S
        )
        self._prompt_size = self._histogram(
            "prompt_tokens_histogram", "Prompt tokens of a request.", TOKEN_COUNT_BUCKETS
        )
        self._reply_size = self._histogram(
            "generation_tokens_histogram", "Output tokens of a request.", TOKEN_COUNT_BUCKETS
        )
        self._num_requests = Counter(
            "sglang:num_requests", "Sequences finished.", ["model_name"], registry=self._registry
        ).labels(model_name)
        self._http_requests = Counter(
            "sglang:http_requests", "HTTP requests.", ["endpoint", "method"], registry=self._registry
        )
        self._http_responses = Counter(
            "sglang:http_responses",
            "HTTP responses.",
            ["endpoint", "status_code", "method"],
            registry=self._registry,
        )

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        histogram = Histogram(
            f"sglang:{name}", text, ["model_name"], registry=self._registry, buckets=tuple(buckets)
        )
        return histogram.labels(self._model_name)

    def observe_first_token(self, elapsed_s: float) -> None:
        self._first_token.observe(elapsed_s)

    def observe_next_tokens(self, elapsed_s: float, num_tokens: int) -> None:
        """`num_tokens` arrived together, `elapsed_s` after the one before them."""
        self._next_token.observe(elapsed_s / num_tokens, num_tokens)

    def observe_finish(self, elapsed_s: float, decode_s: float, num_prompt: int, num_output: int) -> None:
        """`decode_s` is the time from the first output token to the last."""
        self._num_requests.inc()
        self._request.observe(elapsed_s)
        self._prompt_size.observe(num_prompt)
        self._reply_size.observe(num_output)
        if num_output > 1:
            self._per_token.observe(decode_s / (num_output - 1))

    def observe_http_request(self, endpoint: str, method: str) -> None:
        self._http_requests.labels(endpoint, method).inc()

    def observe_http_response(self, endpoint: str, method: str, status: int) -> None:
        self._http_responses.labels(endpoint, str(status), method).inc()

    def render(self) -> bytes:
        """The whole exposition, in Prometheus' text format 0.0.4."""
        return generate_latest(self._registry)


class _TokenTimes:
    """The histogram of the time between tokens. The library's own takes a lock and a walk over the buckets
    for each observation, which is felt at ten thousand tokens a second; all observations come from one
    thread."""

    def __init__(self, model_name: str):
        self._model_name = model_name
        self._counts = [0] * (len(NEXT_TOKEN_BUCKETS_S) + 1)
        self._sum_s = 0.0

    def observe(self, elapsed_s: float, num_tokens: int) -> None:
        self._counts[bisect.bisect_left(NEXT_TOKEN_BUCKETS_S, elapsed_s)] += num_tokens
        self._sum_s += elapsed_s * num_tokens

    def collect(self) -> Iterable[Metric]:
        histogram = HistogramMetricFamily(
            "sglang:inter_token_latency_seconds", "Time between tokens.", labels=["model_name"]
        )
        bounds = [*map(floatToGoString, NEXT_TOKEN_BUCKETS_S), "+Inf"]
        counts = itertools.accumulate(self._counts)
        histogram.add_metric(
            [self._model_name], list(zip(bounds, counts, strict=True)), sum_value=self._sum_s
        )
        yield histogram


class _EngineCollector:
    """Reads the engines' counts at scrape time, so that nothing has to push them."""

    def __init__(self, model_name: str, engines: Sequence[EngineView]):
        self._engines = engines
        is_single = len(engines) == 1
        self._label_names = ["model_name"] if is_single else ["model_name", "dp_rank"]
        self._labels = [
            [model_name] if is_single else [model_name, str(rank)] for rank in range(len(engines))
        ]

    def collect(self) -> Iterable[Metric]:
        counters: dict[str, CounterMetricFamily] = {}
        gauges: dict[str, GaugeMetricFamily] = {}
        names = self._label_names
        tokens = CounterMetricFamily(
            "sglang:realtime_tokens", "Tokens by how they were had.", labels=[*names, "mode"]
        )
        waits = HistogramMetricFamily(
            "sglang:queue_time_seconds", "Time from arrival to admission.", labels=names
        )
        for labels, engine in zip(self._labels, self._engines, strict=True):
            stats = engine.stats
            for name, text, value in _count_series(stats):
                counters.setdefault(name, CounterMetricFamily(name, text, labels=names))
                counters[name].add_metric(labels, value)
            for name, text, value in _gauge_series(stats, engine.info, engine.heartbeat_age_s):
                gauges.setdefault(name, GaugeMetricFamily(name, text, labels=names))
                gauges[name].add_metric(labels, value)
            for mode, count in _count_tokens(stats):
                tokens.add_metric([*labels, mode], count)
            bounds = [*map(str, QUEUE_TIME_BUCKETS_S), "+Inf"]
            counts = itertools.accumulate(stats.queue_time_counts or [0] * len(bounds))
            waits.add_metric(labels, list(zip(bounds, counts, strict=True)), sum_value=stats.queue_time_s)
        return [*counters.values(), tokens, waits, *gauges.values()]


def _count_tokens(stats: EngineStats) -> list[tuple[str, int]]:
    """Where tokens came from: the model's prefill, the prefix cache, or the model's decoding."""
    return [
        ("prefill_compute", stats.num_computed_tokens),
        ("prefill_cache", stats.num_cached_tokens),
        ("decode", stats.num_generated_tokens),
    ]


def _count_series(stats: EngineStats) -> list[tuple[str, str, float]]:
    return [
        ("sglang:prompt_tokens", "Prompt tokens processed.", stats.num_prompt_tokens),
        ("sglang:generation_tokens", "Tokens generated.", stats.num_generated_tokens),
        ("sglang:cached_tokens", "Prompt tokens found in the prefix cache.", stats.num_cached_tokens),
        (
            "sglang:evicted_tokens",
            "Tokens that left the prefix cache to make room.",
            stats.num_evicted_tokens,
        ),
        ("sglang:num_aborted_requests", "Sequences aborted.", stats.num_aborted),
        ("sglang:num_retracted_requests", "Sequences sent back to the queue.", stats.num_retractions),
        ("jaxserve:encoded_images", "Images that the vision encoder ran on.", stats.num_encoded_images),
        ("jaxserve:spec_draft_tokens", "Tokens that speculation guessed.", stats.num_drafted_tokens),
        ("jaxserve:spec_accept_tokens", "Guessed tokens that came true.", stats.num_accepted_tokens),
        ("jaxserve:steps", "Steps launched.", stats.num_steps),
        ("jaxserve:compiles", "Programs compiled or restored.", stats.num_compiles),
        ("jaxserve:late_compiles", "Programs compiled after warm-up.", stats.num_late_compiles),
        ("jaxserve:step_gap_seconds", "Device idle time between steps.", stats.step_gap_s),
        ("jaxserve:step_busy_seconds", "Device time inside steps.", stats.step_busy_s),
    ]


def _gauge_series(
    stats: EngineStats, info: EngineInfo | None, heartbeat_age_s: float
) -> list[tuple[str, str, float]]:
    hit_rate = stats.num_cached_tokens / stats.num_prompt_tokens if stats.num_prompt_tokens else 0.0
    series: list[tuple[str, str, float]] = [
        ("sglang:num_running_reqs", "Sequences running.", stats.num_running),
        ("sglang:num_queue_reqs", "Sequences waiting.", stats.num_queued),
        ("sglang:num_retracted_reqs", "Sequences waiting that have run before.", stats.num_retracted),
        ("sglang:gen_throughput", "Tokens a second, lately.", stats.gen_throughput),
        ("sglang:cache_hit_rate", "Share of prompt tokens found in the prefix cache.", hit_rate),
        ("sglang:spec_accept_length", "Tokens of a sequence in a step.", stats.spec_accept_length),
        ("sglang:spec_accept_rate", "Share of guessed tokens that came true.", stats.spec_accept_rate),
        ("jaxserve:num_free_pages", "Pages free or reclaimable.", stats.num_free_pages),
        ("jaxserve:num_cached_pages", "Pages held by the prefix cache alone.", stats.num_cached_pages),
        ("jaxserve:is_warm", "1 once every program is compiled.", stats.is_warm),
        ("jaxserve:is_ready", "1 once the engine has loaded the model.", info is not None),
        ("jaxserve:is_paused", "1 while generation is paused.", stats.is_paused),
        ("jaxserve:is_sleeping", "1 while device memory is given back.", bool(stats.released)),
        ("jaxserve:kv_bytes", "Bytes of the KV pool now.", stats.kv_bytes),
        ("jaxserve:param_bytes", "Bytes of the parameters on the device now.", stats.param_bytes),
        ("jaxserve:host_param_bytes", "Bytes of parameters asleep on the host.", stats.host_param_bytes),
        ("jaxserve:engine_heartbeat_age_seconds", "Seconds since the engine last spoke.", heartbeat_age_s),
    ]
    if info is None:
        return series
    num_used = max(info.num_pages - stats.num_free_pages, 0) * info.page_size
    return [
        *series,
        ("sglang:num_used_tokens", "Token slots in use.", num_used),
        ("sglang:token_usage", "Share of token slots in use.", num_used / max(info.max_total_tokens, 1)),
        (
            "sglang:utilization",
            "Share of rows in use.",
            stats.num_running / max(info.max_running_requests, 1),
        ),
        ("sglang:max_total_num_tokens", "Token slots in the pool.", info.max_total_tokens),
        ("sglang:startup_time_seconds", "Time from start to ready.", info.startup_s),
    ]
