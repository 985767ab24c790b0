"""What Prometheus is told. Every name is here; docs/operations.md explains them and they do not change.

A registry of its own, so that two services in one process do not count together. No torch, no web.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
ANONYMOUS, OTHER = "anonymous", "other"

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_FILL = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_DEVIATIONS = (-4.0, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)


class Metrics:
    """The service's metrics; any thread may tell it. It is an Observer of the scheduler.

    Labels stay few: clients are named by their keys, not as they call themselves, and any path that is not
    in `routes` is counted as `other`.
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
        self.requests = counter("requests", "Requests answered, by route and status.", "route", "code")
        self.rejections = counter("rejections", "Requests answered with a problem, by its code.", "reason")
        self.client_pairs = counter("client_pairs", "Pairs scored, by configured client.", "client")
        self.pairs = counter("pairs", "Pairs that went through the device.")
        self.cancelled_pairs = counter("cancelled_pairs", "Pairs never run because their caller left.")
        self.expired_pairs = counter("expired_pairs", "Pairs never run because their deadline passed.")
        self.oom_retries = counter("oom_retries", "Batches that did not fit into memory and were halved.")
        self.queue = histogram("queue_seconds", "Seconds a request waited for the device.")
        self.decode = histogram("decode_seconds", "Seconds a request's parsing and images took.")
        self.forward = histogram("forward_seconds", "Seconds of a batch in a tower.", "tower")
        self.batch = histogram("batch_seconds", "Seconds of a batch in all.")
        self.fill = histogram("batch_fill", "Pairs of a batch, as a share of its most.", bounds=_FILL)
        self.queued_pairs = gauge("queued_pairs", "Pairs admitted and not yet begun.")
        self.inflight_bytes = gauge("inflight_bytes", "Bytes of requests under way, decoded ones included.")
        self.ready = gauge("ready", "1 if the service can score.")
        self.evaluator_up = gauge("evaluator_up", "1 if the evaluator is in service.", "evaluator")
        self.lost_log_lines = gauge("lost_log_lines", "Log lines that could not be written.")
        made_by = ("evaluator", "fingerprint", "calibration")
        self.evaluator_info = gauge("evaluator_info", "1, with what makes an evaluator's numbers.", *made_by)
        self.build_info = gauge("build_info", "1, with what runs.", "version", "device", "dtype")
        self.scores = Scores()
        registry.register(self.scores)
        # Memory, open files and when it started, under prometheus-client's own names.
        ProcessCollector(registry=registry)

    def render(self) -> bytes:
        """The answer of `/metrics`."""
        return generate_latest(self.registry)

    def route(self, path: str) -> str:
        """The label of a path."""
        return path if path in self.routes else OTHER

    def on_batch(self, pairs: int, capacity: int, queue_s: Sequence[float], run_s: float) -> None:
        """See the scheduler's Observer."""
        self.fill.observe(pairs / capacity)
        self.batch.observe(run_s)
        self.pairs.inc(pairs)
        for waited_s in queue_s:
            self.queue.observe(waited_s)

    def on_cancelled(self, pairs: int) -> None:
        """See the scheduler's Observer."""
        self.cancelled_pairs.inc(pairs)

    def on_expired(self, pairs: int) -> None:
        """See the scheduler's Observer."""
        self.expired_pairs.inc(pairs)

    def on_oom(self, size: int) -> None:  # noqa: ARG002 - how large it was is in the log
        """See the scheduler's Observer."""
        self.oom_retries.inc()

    def on_forward(self, tower: str, seconds: float) -> None:
        """A tower's seconds in a batch."""
        self.forward.labels(tower).observe(seconds)

    def on_answer(self, route: str, code: int, reason: str | None = None) -> None:
        """A request was answered; `reason` is its problem's code."""
        self.requests.labels(self.route(route), str(code)).inc()
        if reason is not None:
            self.rejections.labels(reason).inc()

    def on_loaded(
        self, evaluators: Mapping[str, tuple[str, str]], version: str, device: str, dtype: str
    ) -> None:
        """The models are loaded.

        Args:
            evaluators: name → fingerprint and calibration
        """
        self.build_info.labels(version, device, dtype).set(1)
        for name, (fingerprint, calibration) in evaluators.items():
            self.evaluator_info.labels(name, fingerprint, calibration).set(1)
            self.evaluator_up.labels(name).set(1)

    def on_change(self, evaluator: str, up: bool, _reason: str = "") -> None:
        """An evaluator went out of service or came back."""
        self.evaluator_up.labels(evaluator).set(up)


class Scores:
    """The histogram of z by evaluator.

    prometheus-client's own takes microseconds a value, and here there are four to each pair. There is no sum:
    it could fall, which Prometheus would take for a restart.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, list[int]] = {}

    def observe(self, evaluator: str, values: Iterable[float]) -> None:
        """Count some z of an evaluator."""
        with self._lock:
            counts = self._counts.setdefault(evaluator, [0] * (len(_DEVIATIONS) + 1))
            for z in values:
                counts[bisect_left(_DEVIATIONS, z)] += 1

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """For the registry."""
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
        """For the registry, which asks for names before there are values."""
        return [HistogramMetricFamily("reward_score", "", labels=["evaluator"])]
