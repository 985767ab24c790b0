"""Metrics: their values, and their agreement with dashboard, alerts and documentation."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from reward_service.observability.metrics import Metrics
from reward_service.protocol import PROBLEM_CODES

ROOT = Path(__file__).resolve().parents[3]
DASHBOARD = ROOT / "deploy/grafana/reward-service.json"
RULES = ROOT / "deploy/prometheus/alerts.yml"
SCRAPING = ROOT / "deploy/prometheus/prometheus.yml"
OPERATIONS = ROOT / "docs/operations.md"

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def metrics() -> Metrics:
    """Metrics with one event of each kind."""
    metrics = Metrics()
    metrics.routes = ("/score", "/v1/score")
    metrics.on_response("/score", 200)
    metrics.on_response("/score", 503, "queue_full")
    metrics.on_batch(16, 64, [0.1, 0.2], 0.5)
    metrics.on_cancelled(3)
    metrics.on_expired(2)
    metrics.on_oom(64)
    metrics.on_forward("clip", 0.2)
    metrics.on_loaded({"clip": ("print", "scale")}, "1.0", "cpu", "float32")
    metrics.client_pairs.labels("team").inc(16)
    metrics.decode.observe(0.01)
    metrics.scores.observe("clip", [-9.0, 0.0, 0.2, 9.0])
    return metrics


def samples(metrics: Metrics) -> Samples:
    families = text_string_to_metric_families(metrics.render().decode())
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[name, frozenset(labels.items())]


def names(metrics: Metrics) -> set[str]:
    return {name for name, _ in samples(metrics)}


def mentioned(expression: str) -> set[str]:
    """Return the metrics in a PromQL expression."""
    return set(re.findall(r"\b(?:reward|process)_[a-z_]+\b", re.sub(r'"[^"]*"', "", expression)))


def test_recorded_events_are_rendered(metrics: Metrics) -> None:
    """Each value has its documented name, in a format that Prometheus parses."""
    assert value(metrics, "reward_requests_total", route="/score", code="503") == 1
    assert value(metrics, "reward_rejections_total", reason="queue_full") == 1
    assert value(metrics, "reward_queue_seconds_count") == 2
    assert value(metrics, "reward_batch_fill_sum") == 0.25
    assert value(metrics, "reward_cancelled_pairs_total") == 3
    assert value(metrics, "reward_expired_pairs_total") == 2
    assert value(metrics, "reward_oom_retries_total") == 1
    assert value(metrics, "reward_forward_seconds_sum", tower="clip") == 0.2
    assert value(metrics, "reward_evaluator_up", evaluator="clip") == 1
    metrics.on_evaluator_change("clip", False)
    assert value(metrics, "reward_evaluator_up", evaluator="clip") == 0


def test_scores_are_a_histogram_of_z(metrics: Metrics) -> None:
    """Buckets are cumulative, include their upper bound, and the last one has all values."""

    def bucket(bound: str) -> float:
        return value(metrics, "reward_score_bucket", evaluator="clip", le=bound)

    assert [bucket(bound) for bound in ("-4.0", "-0.5", "0.0", "0.5", "4.0", "+Inf")] == [1, 1, 2, 3, 3, 4]
    # A sum that can decrease is not a counter: rate() would take each decrease for a restart.
    assert not names(metrics) & {"reward_score_sum", "reward_score_count"}


def test_unknown_paths_share_one_label(metrics: Metrics) -> None:
    """A thousand unknown paths are one label: memory stays bounded whatever clients request."""
    before = len(samples(metrics))
    for number in range(1000):
        metrics.on_response(f"/made/up/{number}", 404, "not_found")
    assert len(samples(metrics)) <= before + 4
    assert value(metrics, "reward_requests_total", route="other", code="404") == 1000


def test_two_services_are_counted_apart(metrics: Metrics) -> None:
    """Each has a registry of its own."""
    assert value(Metrics(), "reward_cancelled_pairs_total") == 0
    assert value(metrics, "reward_cancelled_pairs_total") == 3


def test_metrics_import_no_torch() -> None:
    """A process that only counts starts in milliseconds."""
    program = (
        "import sys, reward_service.observability.metrics; assert not {'torch', 'fastapi'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=60)


def test_dashboard_shows_every_metric(metrics: Metrics) -> None:
    """Every metric on it exists, every metric of the service is on it, and no panel is empty."""
    board: dict[str, Any] = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    shown = set().union(*map(mentioned, expressions))
    assert shown - names(metrics) == set()
    assert all(mentioned(expression) for expression in expressions)
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    stems = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in shown}
    ours = {
        re.sub(r"_(bucket|sum|count|total|created)$", "", name)
        for name in names(metrics)
        if name.startswith("reward_")
    }
    assert ours - stems == set()


def test_alerts_use_existing_metrics(metrics: Metrics) -> None:
    """Every metric and every reason in a rule exists; each rule has a severity and a summary."""
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    assert len(group["rules"]) >= 5
    for rule in group["rules"]:
        assert mentioned(rule["expr"]) - names(metrics) == set()
        for reasons in re.findall(r'reason=~"([^"]*)"', rule["expr"]):
            assert set(reasons.split("|")) <= PROBLEM_CODES.keys()
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"]
    scraping = yaml.safe_load(SCRAPING.read_text())
    assert scraping["rule_files"] == [RULES.name]
    (job,) = scraping["scrape_configs"]
    assert (job["job_name"], job["metrics_path"]) == ("reward-service", "/metrics")
    assert f'job="{job["job_name"]}"' in RULES.read_text()


def test_operations_page_documents_every_metric_and_alert(metrics: Metrics) -> None:
    """The documented metrics and alerts are exactly those that exist."""
    text = OPERATIONS.read_text()
    ours = {name for name in names(metrics) if name.startswith("reward_") and not name.endswith("_created")}
    ours = {re.sub(r"_(bucket|sum|count)$", "", name) for name in ours}
    explained = set(re.findall(r"`(reward_[a-z_]+)", text))
    assert ours == explained
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    assert {rule["alert"] for rule in group["rules"]} == set(re.findall(r"`(Reward[A-Z][A-Za-z]+)`", text))
