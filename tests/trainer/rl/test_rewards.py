"""The trainer's view of the service, over the real client and a fake wire."""

import httpx
import msgspec
import numpy as np
import pytest

from reward_service.client import RewardClient
from reward_service.protocol import (
    EvaluatorDescription,
    EvaluatorIdentity,
    EvaluatorList,
    EvaluatorScore,
    ItemResult,
    Problem,
    ScoreResponse,
)
from trainer.rl.rewards import ScoringError, ServiceScorer, composite

IMAGES = np.zeros((2, 8, 8, 3), dtype=np.uint8)


def service(fingerprint: str = "f", status: int = 200, names: tuple[str, ...] = ("hpsv2", "clip")):
    """A wire that answers like a service with two evaluators."""

    def answer(request: httpx.Request) -> httpx.Response:
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
        RewardClient("http://judge", transport=httpx.MockTransport(answer), retry_budget_s=0)
    )


def test_columns_follow_the_evaluators() -> None:
    """Raw and z of each evaluator stay in its own column, sorted by name."""
    scorer = service()
    assert scorer.evaluators == ("clip", "hpsv2")
    scores = scorer.score(["a", "b"], IMAGES)
    assert scores.raw.tolist() == [[4, 5], [5, 6]]
    assert scores.z.tolist() == [[-4, -5], [-5, -6]]


def test_a_changed_judge_is_an_error() -> None:
    """Scores of two versions of an evaluator are never mixed in a run."""
    with pytest.raises(ScoringError, match="no longer those the run began with") as caught:
        service(fingerprint="other").score(["a", "b"], IMAGES)
    assert not caught.value.retryable


@pytest.mark.parametrize(("status", "retryable"), [(500, True), (422, False)])
def test_failures_are_errors_that_say_whether_to_ask_again(status: int, retryable: bool) -> None:
    """A service that stumbles is asked again, one that refuses is not."""
    with pytest.raises(ScoringError) as caught:
        service(status=status).score(["a", "b"], IMAGES)
    assert caught.value.retryable is retryable


def scorer_after(answers: list[httpx.Response | Exception], budget_s: float = 60.0) -> ServiceScorer:
    """A scorer whose requests for scores are answered so, the last answer for ever; it never sleeps."""
    described = {"clip": EvaluatorDescription("f", "c", "cosine", 0.0, 1.0, 1.0, False)}

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/evaluators":
            content = msgspec.json.encode(EvaluatorList(described, "cpu", "float32"))
            return httpx.Response(200, content=content)
        asked.append(request)
        now = answers[min(len(asked), len(answers)) - 1]
        if isinstance(now, Exception):
            raise now
        return now

    asked: list[httpx.Request] = []
    client = RewardClient(
        "http://judge", transport=httpx.MockTransport(answer), retry_budget_s=budget_s, sleep=lambda _: None
    )
    scorer = ServiceScorer(client)
    scorer.asked = asked  # type: ignore[attr-defined]
    return scorer


@pytest.mark.parametrize(
    ("answer", "outage"),
    [
        (httpx.ConnectError("refused"), True),
        (httpx.ReadTimeout("slow"), True),
        (httpx.Response(503), False),
        (httpx.Response(429), False),
        (httpx.Response(401), True),
    ],
)
def test_what_the_client_has_waited_for_is_not_waited_for_again(
    answer: httpx.Response | Exception, outage: bool
) -> None:
    """The client's retry budget is all: a repetition by the rollout would multiply it. Who says that nobody
    answers, or that the key is wrong, says it for the next micro-batch too."""
    with pytest.raises(ScoringError) as caught:
        scorer_after([answer], budget_s=0).score(["a"], IMAGES[:1])
    assert not caught.value.retryable
    assert caught.value.outage is outage
    assert "\n" not in str(caught.value)


def test_another_judge_is_an_outage() -> None:
    """No further image is worth asking for once an evaluator has changed."""
    with pytest.raises(ScoringError) as caught:
        service(fingerprint="other").score(["a", "b"], IMAGES)
    assert caught.value.outage


def test_a_service_that_comes_back_within_the_budget_is_not_noticed() -> None:
    """Killed, loading, there again: the scores arrive, and no group is lost."""
    result = ItemResult(0, 0.0, {"clip": EvaluatorScore(0.3, 1.0, 0.8)}, False, False)
    response = ScoreResponse("id", [result], {"clip": EvaluatorIdentity("f", "c")}, {})
    scores = httpx.Response(
        200, content=msgspec.msgpack.encode(response), headers={"content-type": "application/msgpack"}
    )
    scorer = scorer_after(
        [httpx.ReadError("reset"), httpx.ConnectError("refused"), httpx.Response(503), scores]
    )
    assert scorer.score(["a"], IMAGES[:1]).z.tolist() == [[1.0]]
    assert len(scorer.asked) == 4  # type: ignore[attr-defined]


def test_a_missing_evaluator_is_an_error() -> None:
    """No column is ever filled in."""
    with pytest.raises(ScoringError, match="hpsv2"):
        service(names=("clip",)).score(["a", "b"], IMAGES)


def test_composite_is_a_weighted_mean() -> None:
    """Weights are relative; an evaluator that is not named weighs 0."""
    z = np.array([[1.0, 5.0, 100.0]])
    assert composite(z, ("a", "b", "c"), {"a": 3.0, "b": 1.0}).tolist() == [2.0]
