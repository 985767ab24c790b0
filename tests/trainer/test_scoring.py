"""The learner's view of the service, over the real client and a fake wire."""

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
    ScoreResponse,
)
from trainer.scoring import ScoringError, ServiceScorer, composite

PICTURES = np.zeros((2, 8, 8, 3), dtype=np.uint8)


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
            return httpx.Response(status)
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
    scores = scorer.score(["a", "b"], PICTURES)
    assert scores.raw.tolist() == [[4, 5], [5, 6]]
    assert scores.z.tolist() == [[-4, -5], [-5, -6]]


def test_a_changed_judge_is_an_error() -> None:
    """Scores of two versions of an evaluator are never mixed in a run."""
    with pytest.raises(ScoringError, match="no longer those the run began with") as caught:
        service(fingerprint="other").score(["a", "b"], PICTURES)
    assert not caught.value.retryable


@pytest.mark.parametrize(("status", "retryable"), [(500, True), (422, False)])
def test_failures_are_errors_that_say_whether_to_ask_again(status: int, retryable: bool) -> None:
    """A service that stumbles is asked again, one that refuses is not."""
    with pytest.raises(ScoringError) as caught:
        service(status=status).score(["a", "b"], PICTURES)
    assert caught.value.retryable is retryable


def test_a_missing_evaluator_is_an_error() -> None:
    """No column is ever filled in."""
    with pytest.raises(ScoringError, match="hpsv2"):
        service(names=("clip",)).score(["a", "b"], PICTURES)


def test_composite_is_a_weighted_mean() -> None:
    """Weights are relative; an evaluator that is not named weighs 0."""
    z = np.array([[1.0, 5.0, 100.0]])
    assert composite(z, ("a", "b", "c"), {"a": 3.0, "b": 1.0}).tolist() == [2.0]
