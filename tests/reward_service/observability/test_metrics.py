"""What Prometheus is told, and that dashboard, alerts and documentation speak of nothing else."""

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
from reward_service.protocol import CODES

ROOT = Path(__file__).resolve().parents[3]
DASHBOARD = ROOT / "deploy/grafana/reward-service.json"
RULES = ROOT / "deploy/prometheus/alerts.yml"
SCRAPING = ROOT / "deploy/prometheus/prometheus.yml"
HANDBOOK = ROOT / "docs/operations.md"

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def metrics() -> Metrics:
    """One that has been told of everything once."""
    metrics = Metrics()
    metrics.routes = ("/score", "/v1/score")
    metrics.on_answer("/score", 200)
    metrics.on_answer("/score", 503, "queue_full")
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
    """The metrics of a PromQL expression."""
    return set(re.findall(r"\b(?:reward|process)_[a-z_]+\b", re.sub(r'"[^"]*"', "", expression)))


def test_what_is_told_is_shown(metrics: Metrics) -> None:
    """Each number under the name that is documented, in a form that Prometheus reads."""
    assert value(metrics, "reward_requests_total", route="/score", code="503") == 1
    assert value(metrics, "reward_rejections_total", reason="queue_full") == 1
    assert value(metrics, "reward_queue_seconds_count") == 2
    assert value(metrics, "reward_batch_fill_sum") == 0.25
    assert value(metrics, "reward_cancelled_pairs_total") == 3
    assert value(metrics, "reward_expired_pairs_total") == 2
    assert value(metrics, "reward_oom_retries_total") == 1
    assert value(metrics, "reward_forward_seconds_sum", tower="clip") == 0.2
    assert value(metrics, "reward_evaluator_up", evaluator="clip") == 1
    metrics.on_change("clip", False, "it failed")
    assert value(metrics, "reward_evaluator_up", evaluator="clip") == 0


def test_scores_are_a_histogram_of_z(metrics: Metrics) -> None:
    """Cumulative, with everything in the last bucket and a bound in its own."""

    def bucket(bound: str) -> float:
        return value(metrics, "reward_score_bucket", evaluator="clip", le=bound)

    assert [bucket(bound) for bound in ("-4.0", "-0.5", "0.0", "0.5", "4.0", "+Inf")] == [1, 1, 2, 3, 3, 4]
    # A sum that can fall is no counter: rate() would take each fall for a restart.
    assert not names(metrics) & {"reward_score_sum", "reward_score_count"}


def test_nobody_can_make_labels(metrics: Metrics) -> None:
    """A thousand unknown paths are one label: memory stays bounded whatever is asked for."""
    before = len(samples(metrics))
    for number in range(1000):
        metrics.on_answer(f"/made/up/{number}", 404, "not_found")
    assert len(samples(metrics)) <= before + 4
    assert value(metrics, "reward_requests_total", route="other", code="404") == 1000


def test_two_services_do_not_count_together(metrics: Metrics) -> None:
    """Each has a registry of its own."""
    assert value(Metrics(), "reward_cancelled_pairs_total") == 0
    assert value(metrics, "reward_cancelled_pairs_total") == 3


def test_metrics_need_no_torch() -> None:
    """A process that only counts starts in milliseconds."""
    program = (
        "import sys, reward_service.observability.metrics; assert not {'torch', 'fastapi'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=60)


def test_the_dashboard_shows_what_there_is(metrics: Metrics) -> None:
    """Every metric in it exists, every metric of ours but its notes is on it, and no panel is empty."""
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


def test_alerts_are_of_what_there_is(metrics: Metrics) -> None:
    """Every metric and every reason in a rule exists; each rule says how bad it is and what it is."""
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    assert len(group["rules"]) >= 5
    for rule in group["rules"]:
        assert mentioned(rule["expr"]) - names(metrics) == set()
        for reasons in re.findall(r'reason=~"([^"]*)"', rule["expr"]):
            assert set(reasons.split("|")) <= CODES.keys()
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"]
    scraping = yaml.safe_load(SCRAPING.read_text())
    assert scraping["rule_files"] == [RULES.name]
    (job,) = scraping["scrape_configs"]
    assert (job["job_name"], job["metrics_path"]) == ("reward-service", "/metrics")
    assert f'job="{job["job_name"]}"' in RULES.read_text()


def test_the_handbook_has_every_metric_and_every_alert(metrics: Metrics) -> None:
    """What is shown is explained, and what is explained is shown."""
    text = HANDBOOK.read_text()
    ours = {name for name in names(metrics) if name.startswith("reward_") and not name.endswith("_created")}
    ours = {re.sub(r"_(bucket|sum|count)$", "", name) for name in ours}
    explained = set(re.findall(r"`(reward_[a-z_]+)", text))
    assert ours == explained
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    assert {rule["alert"] for rule in group["rules"]} == set(re.findall(r"`(Reward[A-Z][A-Za-z]+)`", text))
