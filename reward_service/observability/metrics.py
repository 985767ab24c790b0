"""Prometheus metrics of the service. docs/operations.md explains every name; the names are stable.

Each `Metrics` has its own registry, so that two services in one process are counted apart. This module needs
neither torch nor a web server.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
ANONYMOUS, OTHER = "anonymous", "other"

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_FILL = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_DEVIATIONS = (-4.0, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)


class Metrics:
    """Metrics of one service, safe to update from any thread; an `Observer` of the scheduler.

    The number of labels is bounded: clients are labelled with the name of their key, never with a name that
    they send, and any path that is not in `routes` is counted as `other`.
    """

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.routes: Collection[str] = ()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"reward_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"reward_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, *labels: str, bounds: Sequence[float] = _SECONDS) -> Histogram:
            return Histogram(f"reward_{name}", text, labels, registry=registry, buckets=bounds)

        # prometheus-client adds _total to a counter's name.
        self.requests = counter("requests", "Responses, by route and status.", "route", "code")
        # Looked up for every request; there are as many as routes times statuses.
        self._responses = cache(lambda route, code: self.requests.labels(route, str(code)))
        self.rejections = counter("rejections", "Problem responses, by problem code.", "reason")
        self.client_pairs = counter("client_pairs", "Pairs scored, by configured client.", "client")
        self.pairs = counter("pairs", "Pairs scored on the device.")
        self.cancelled_pairs = counter(
            "cancelled_pairs", "Pairs not scored because their client disconnected."
        )
        self.expired_pairs = counter("expired_pairs", "Pairs not scored because their deadline passed.")
        self.oom_retries = counter("oom_retries", "Batches halved after running out of memory.")
        self.queue = histogram("queue_seconds", "Seconds that a request waited in the queue.")
        self.decode = histogram("decode_seconds", "Seconds to parse a request and decode its images.")
        self.forward = histogram("forward_seconds", "Seconds of a batch in a tower.", "tower")
        self.batch = histogram("batch_seconds", "Total seconds of a batch.")
        self.fill = histogram("batch_fill", "Pairs of a batch, as a fraction of its capacity.", bounds=_FILL)
        self.queued_pairs = gauge("queued_pairs", "Pairs admitted and not yet started.")
        self.inflight_bytes = gauge(
            "inflight_bytes", "Bytes of requests in progress, decoded images included."
        )
        self.ready = gauge("ready", "1 if the service is ready to score.")
        self.evaluator_up = gauge("evaluator_up", "1 if the evaluator is in service.", "evaluator")
        self.lost_log_lines = gauge("lost_log_lines", "Log lines that could not be written.")
        self.evaluator_info = gauge(
            "evaluator_info",
            "1, labelled with what determines an evaluator's scores.",
            *("evaluator", "fingerprint", "calibration"),
        )
        self.build_info = gauge(
            "build_info", "1, labelled with version, device and dtype.", "version", "device", "dtype"
        )
        self.scores = Scores()
        registry.register(self.scores)
        # Memory, open files and start time, under prometheus-client's own names.
        ProcessCollector(registry=registry)

    def render(self) -> bytes:
        """Return the body of `/metrics`."""
        return generate_latest(self.registry)

    def route(self, path: str) -> str:
        """Return the `route` label of a path."""
        return path if path in self.routes else OTHER

    def on_batch(self, pairs: int, capacity: int, queue_s: Sequence[float], run_s: float) -> None:
        """See `Observer` of the scheduler."""
        self.fill.observe(pairs / capacity)
        self.batch.observe(run_s)
        self.pairs.inc(pairs)
        for waited_s in queue_s:
            self.queue.observe(waited_s)

    def on_cancelled(self, pairs: int) -> None:
        """See `Observer` of the scheduler."""
        self.cancelled_pairs.inc(pairs)

    def on_expired(self, pairs: int) -> None:
        """See `Observer` of the scheduler."""
        self.expired_pairs.inc(pairs)

    def on_oom(self, size: int) -> None:  # noqa: ARG002 - the size would make no useful label
        """See `Observer` of the scheduler."""
        self.oom_retries.inc()

    def on_forward(self, tower: str, seconds: float) -> None:
        """Record the seconds of a batch in a tower."""
        self.forward.labels(tower).observe(seconds)

    def on_response(self, route: str, code: int, reason: str | None = None) -> None:
        """Count a response; `reason` is the problem code, None if it is not a problem."""
        self._responses(self.route(route), code).inc()
        if reason is not None:
            self.rejections.labels(reason).inc()

    def on_loaded(
        self, evaluators: Mapping[str, tuple[str, str]], version: str, device: str, dtype: str
    ) -> None:
        """Record what was loaded.

        Args:
            evaluators: name → (fingerprint, calibration)
            version: of this package
            device: the device that scores
            dtype: of the trunks
        """
        self.build_info.labels(version, device, dtype).set(1)
        for name, (fingerprint, calibration) in evaluators.items():
            self.evaluator_info.labels(name, fingerprint, calibration).set(1)
            self.evaluator_up.labels(name).set(1)

    def on_evaluator_change(self, evaluator: str, up: bool) -> None:
        """Record that an evaluator went out of service or came back."""
        self.evaluator_up.labels(evaluator).set(up)


class Scores:
    """Histogram of z by evaluator.

    prometheus-client's own histogram takes microseconds a value, and each pair has four values. This one has
    no sum: a sum of z can decrease, which Prometheus would take for a restart.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, list[int]] = {}

    def observe(self, evaluator: str, values: Iterable[float]) -> None:
        """Count values of z of an evaluator."""
        with self._lock:
            counts = self._counts.setdefault(evaluator, [0] * (len(_DEVIATIONS) + 1))
            for z in values:
                counts[bisect_left(_DEVIATIONS, z)] += 1

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Yield the histogram (prometheus-client's collector protocol)."""
        family = HistogramMetricFamily(
            "reward_score", "Scores in calibrated deviations (z).", labels=["evaluator"]
        )
        with self._lock:
            for evaluator, counts in self._counts.items():
                cumulative, buckets = 0, []
                for bound, count in zip([*map(str, _DEVIATIONS), "+Inf"], counts, strict=True):
                    cumulative += count
                    buckets.append((bound, cumulative))
                family.add_metric([evaluator], buckets, None)
        yield family

    def describe(self) -> list[HistogramMetricFamily]:
        """Return the name and labels, which the registry needs before there are values."""
        return [HistogramMetricFamily("reward_score", "", labels=["evaluator"])]
