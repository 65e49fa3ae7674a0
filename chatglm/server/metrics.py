"""What Prometheus reads at /metrics, in a registry of each app's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from chatglm.engine.answer import Answer
    from chatglm.engine.engine import Engine

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
GAUGES = {
    "running": "Requests that are being answered.",
    "waiting": "Requests that wait for a place in the batch.",
}
COUNTERS = {
    "prompt_tokens": "Tokens of all prompts.",
    "cached_tokens": "Tokens of prompts that were not computed again.",
    "generated_tokens": "Tokens of all answers.",
    "finished": "Answers that came to their end.",
    "cancelled": "Answers that were given up, by the client or at the shutdown.",
    "failed": "Answers that failed.",
}


class Metrics:
    """Counts what the routes see; what the engine counts itself is read from it when asked."""

    def __init__(self, engine: Callable[[], Engine | None]) -> None:
        self.registry = CollectorRegistry()
        labels = ["method", "route", "status"]
        self.requests = Counter("chatglm_requests", "Answered HTTP requests.", labels, registry=self.registry)
        self.first_token = Histogram(
            "chatglm_time_to_first_token_seconds",
            "From the request to the first token of its answer.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.per_token = Histogram(
            "chatglm_seconds_per_token",
            "Mean time between two tokens of an answer.",
            buckets=tuple(seconds / 10 for seconds in SECONDS),
            registry=self.registry,
        )
        self.registry.register(_EngineCollector(engine))
        ProcessCollector(registry=self.registry)

    def answered(self, answer: Answer) -> None:
        """Counts the times of an answer that has ended."""
        if answer.started is None or answer.ended is None:
            return
        self.first_token.observe(answer.started - answer.submitted)
        if answer.completion_tokens > 1:
            self.per_token.observe((answer.ended - answer.started) / (answer.completion_tokens - 1))

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """The engine's own numbers; nothing while the model is loading."""

    def __init__(self, engine: Callable[[], Engine | None]) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine = self._engine()
        if engine is None:
            return
        statistics = engine.statistics()
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(f"chatglm_{name}", text, value=getattr(statistics, name))
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"chatglm_{name}", text, value=getattr(statistics, name))
