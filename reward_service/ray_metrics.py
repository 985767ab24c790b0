"""One page of metrics for all replicas: a scrape through a proxy reaches any of them, and none twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector, CollectorRegistry

from reward_service.metrics import Metrics

LABEL = "replica"


class ReplicaMetrics(Metrics):
    """A replica's metrics, whose page shows every replica's, told apart by the label ``replica``.

    :param pages: gets all replicas' own pages by their names; may take its time, and may lack some
    """

    def __init__(self, pages: Callable[[], Mapping[str, bytes]]) -> None:
        super().__init__()
        self._pages = pages

    def own(self) -> bytes:
        """This replica's page."""
        return super().render()

    def render(self) -> bytes:
        """The answer of ``/metrics``."""
        return merged(self._pages())


def merged(pages: Mapping[str, bytes]) -> bytes:
    """Pages of Prometheus text as one, each sample with the name of its page as the label ``replica``."""
    families: dict[str, Metric] = {}
    for name, page in sorted(pages.items()):
        for family in text_string_to_metric_families(page.decode()):
            known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            known.samples += [
                sample._replace(labels={LABEL: name, **sample.labels}) for sample in family.samples
            ]
    registry = CollectorRegistry()
    registry.register(_Families(list(families.values())))
    return generate_latest(registry)


class _Families(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families
