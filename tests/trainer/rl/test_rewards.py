"""Service scorer with the real client and a fake transport."""

import httpx
import msgspec
import numpy as np
import pytest

from reward_service.client import NotReadyError, RewardClient
from reward_service.protocol import (
    EvaluatorDescription,
    EvaluatorIdentity,
    EvaluatorList,
    EvaluatorScore,
    ItemResult,
    Problem,
    ScoreResponse,
)
from trainer.config import ServiceConfig
from trainer.rl.rewards import ScoringError, ServiceScorer, composite

IMAGES = np.zeros((2, 8, 8, 3), dtype=np.uint8)


def service(fingerprint: str = "f", status: int = 200, names: tuple[str, ...] = ("hpsv2", "clip")):
    """Return a scorer whose transport responds like a service with two evaluators."""

    def respond(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/evaluators":
            described = {
                name: EvaluatorDescription("f", "c", "cosine", 0.0, 1.0, 1.0, False)
                for name in ("hpsv2", "clip")
            }
            return httpx.Response(
                200, content=msgspec.json.encode(EvaluatorList(described, "cpu", "float32"))
            )
        if status != 200:
            problem = Problem("t", status, "scoring_failed", "d", retryable=False, id="i")
            return httpx.Response(status, content=msgspec.json.encode(problem))
        results = [
            ItemResult(
                i,
                0.0,
                {name: EvaluatorScore(len(name) + i, -len(name) - i, 0.5) for name in names},
                False,
                False,
            )
            for i in range(2)
        ]
        identities = {name: EvaluatorIdentity(fingerprint, "c") for name in names}
        response = ScoreResponse("id", results, identities, {})
        return httpx.Response(
            200, content=msgspec.msgpack.encode(response), headers={"content-type": "application/msgpack"}
        )

    return ServiceScorer(
        RewardClient("http://rewards", transport=httpx.MockTransport(respond), retry_budget_s=0)
    )


def test_scorer_columns_follow_evaluators() -> None:
    """Raw and z of each evaluator are in its own column, sorted by name."""
    scorer = service()
    assert scorer.evaluators == ("clip", "hpsv2")
    scores = scorer.score(["a", "b"], IMAGES)
    assert scores.raw.tolist() == [[4, 5], [5, 6]]
    assert scores.z.tolist() == [[-4, -5], [-5, -6]]


def test_scorer_refuses_changed_evaluator() -> None:
    """Scores of two versions of an evaluator are never mixed in a run."""
    with pytest.raises(ScoringError, match="evaluators clip, hpsv2 changed during the run") as caught:
        service(fingerprint="other").score(["a", "b"], IMAGES)
    assert not caught.value.retryable


@pytest.mark.parametrize(("status", "retryable"), [(500, True), (422, False)])
def test_scoring_error_reports_if_retryable(status: int, retryable: bool) -> None:
    """A server error may be retried, a refused request may not."""
    with pytest.raises(ScoringError) as caught:
        service(status=status).score(["a", "b"], IMAGES)
    assert caught.value.retryable is retryable


def scorer_with_responses(
    responses: list[httpx.Response | Exception], budget_s: float = 60.0
) -> ServiceScorer:
    """Return a scorer whose scoring requests get these responses, the last one repeatedly; never sleeps."""
    descriptions = {"clip": EvaluatorDescription("f", "c", "cosine", 0.0, 1.0, 1.0, False)}

    def respond(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/evaluators":
            content = msgspec.json.encode(EvaluatorList(descriptions, "cpu", "float32"))
            return httpx.Response(200, content=content)
        requests.append(request)
        response = responses[min(len(requests), len(responses)) - 1]
        if isinstance(response, Exception):
            raise response
        return response

    requests: list[httpx.Request] = []
    client = RewardClient(
        "http://rewards",
        transport=httpx.MockTransport(respond),
        retry_budget_s=budget_s,
        sleep=lambda _: None,
    )
    scorer = ServiceScorer(client)
    scorer.requests = requests  # type: ignore[attr-defined]
    return scorer


@pytest.mark.parametrize(
    ("response", "outage"),
    [
        (httpx.ConnectError("refused"), True),
        (httpx.ReadTimeout("slow"), True),
        (httpx.Response(503), False),
        (httpx.Response(429), False),
        (httpx.Response(401), True),
    ],
)
def test_scoring_error_is_not_retryable_after_client_retries(
    response: httpx.Response | Exception, outage: bool
) -> None:
    """The client's retry budget is not multiplied by the rollout's own attempts.

    An unreachable service and a refused API key are outages: the next micro-batch would fail too.
    """
    with pytest.raises(ScoringError) as caught:
        scorer_with_responses([response], budget_s=0).score(["a"], IMAGES[:1])
    assert not caught.value.retryable
    assert caught.value.outage is outage
    assert "\n" not in str(caught.value)


def test_changed_evaluator_is_an_outage() -> None:
    """No further image is scored once an evaluator has changed."""
    with pytest.raises(ScoringError) as caught:
        service(fingerprint="other").score(["a", "b"], IMAGES)
    assert caught.value.outage


def test_service_restart_within_retry_budget_loses_nothing() -> None:
    """A service that is killed, loads and is ready again returns the scores; no group is dropped."""
    result = ItemResult(0, 0.0, {"clip": EvaluatorScore(0.3, 1.0, 0.8)}, False, False)
    response = ScoreResponse("id", [result], {"clip": EvaluatorIdentity("f", "c")}, {})
    scores = httpx.Response(
        200, content=msgspec.msgpack.encode(response), headers={"content-type": "application/msgpack"}
    )
    scorer = scorer_with_responses(
        [httpx.ReadError("reset"), httpx.ConnectError("refused"), httpx.Response(503), scores]
    )
    assert scorer.score(["a"], IMAGES[:1]).z.tolist() == [[1.0]]
    assert len(scorer.requests) == 4  # type: ignore[attr-defined]


def test_missing_evaluator_is_an_error() -> None:
    """A missing column is never filled in."""
    with pytest.raises(ScoringError, match="hpsv2"):
        service(names=("clip",)).score(["a", "b"], IMAGES)


def test_composite_is_weighted_mean() -> None:
    """Weights are relative; an evaluator that is not named has weight 0."""
    z = np.array([[1.0, 5.0, 100.0]])
    assert composite(z, ("a", "b", "c"), {"a": 3.0, "b": 1.0}).tolist() == [2.0]


def test_waiting_for_the_service_names_its_proxy(monkeypatch, capsys):
    """A proxy that swallows the requests is the likely cause of a long wait; its password is not shown."""
    monkeypatch.setenv("HTTP_PROXY", "http://me:hunter2@127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "elsewhere")
    config = ServiceConfig(url="http://reward:8000", ready_timeout_s=0.5)
    with pytest.raises(NotReadyError, match=r"through the proxy 127\.0\.0\.1:9 \(HTTP_PROXY\)"):
        ServiceScorer.connect(config)
    line = capsys.readouterr().err
    assert "waiting up to 0.5 s for the reward service at http://reward:8000 through the proxy 127" in line
    assert "hunter2" not in line
