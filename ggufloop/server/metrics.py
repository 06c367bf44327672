"""What a server measures of itself, as Prometheus text.

metrics = Metrics(worker); metrics.request("/v1/completions", 200); metrics.first_token(0.2); metrics.text()
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ggufloop.server.worker import Worker

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, worker: Worker) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "ggufloop_requests", "Requests answered", ["endpoint", "status"], registry=self._registry
        )
        self._first = Histogram(
            "ggufloop_first_token_seconds", "From a request to its first token", buckets=_SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self._whole = Histogram(
            "ggufloop_answer_seconds", "From a request to its answer's end", buckets=_SECONDS, registry=self._registry
        )
        self._registry.register(_Engine(worker))

    def request(self, endpoint: str, status: int) -> None:
        """A request has been answered."""
        self._requests.labels(endpoint, str(status)).inc()

    def first_token(self, seconds: float) -> None:
        """An answer has begun."""
        self._first.observe(seconds)

    def answered(self, seconds: float) -> None:
        """An answer has ended."""
        self._whole.observe(seconds)

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return bytes(generate_latest(self._registry))


class _Engine(Collector):  # type: ignore[misc]  # mypy does not look at prometheus_client
    """What the engine thread counts, read when it is asked for."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def collect(self) -> Iterator[Metric]:
        worker = self._worker
        for name, told in (
            ("prompt", "Prompt tokens read"),
            ("cached", "Prompt tokens that did not have to be read again"),
            ("generated", "Tokens generated"),
        ):
            yield CounterMetricFamily(f"ggufloop_{name}_tokens", told, value=worker.counts[name])
        yield CounterMetricFamily(
            "ggufloop_refused", "Requests refused for want of room", value=worker.counts["refused"]
        )
        answers = CounterMetricFamily("ggufloop_answers", "Answers by how they ended", labels=["finish"])
        for finish in ("stop", "length", "cancelled", "failed"):
            answers.add_metric([finish], worker.counts[f"answers {finish}"])
        yield answers
        yield GaugeMetricFamily("ggufloop_running", "Answers being generated", value=worker.running())
        yield GaugeMetricFamily("ggufloop_waiting", "Requests waiting", value=worker.waiting())
        engine = worker.engine
        if engine is not None:
            store = engine.lanes.store
            yield GaugeMetricFamily("ggufloop_saved", "Conversations kept outside the context", value=len(store))
            yield GaugeMetricFamily("ggufloop_saved_bytes", "Their bytes", value=store.size)
