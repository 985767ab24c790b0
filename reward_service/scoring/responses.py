"""A request's way out: raw scores to results, for the service and the command line alike. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from reward_service.engine.types import PairScores
from reward_service.protocol import EvaluatorIdentity, ItemResult, ProblemError
from reward_service.scoring.calibration import Calibration, compose
from reward_service.scoring.requests import DecodedRequest


def item_results(
    request: DecodedRequest, scored: Sequence[PairScores], calibration: Calibration, first: int = 0
) -> list[ItemResult]:
    """The results of a request's pairs, by the evaluators that scored every one of them.

    Args:
        first: index of the first of them
    """
    names = working(request, scored)
    return [
        _result(request, names, index, first + index, pair, calibration) for index, pair in enumerate(scored)
    ]


def working(request: DecodedRequest, scored: Sequence[PairScores]) -> tuple[str, ...]:
    """The evaluators that scored every pair: one that failed on the way is left out of all of them."""
    failed = {name for pair in scored for name in pair.failed}
    return tuple(name for name in request.evaluators if name not in failed)


def identities(fingerprints: Mapping[str, str], calibration: Calibration) -> dict[str, EvaluatorIdentity]:
    """What produced the numbers of each evaluator."""
    return {
        name: EvaluatorIdentity(fingerprint, calibration.evaluators[name].identity)
        for name, fingerprint in fingerprints.items()
    }


def _result(
    request: DecodedRequest,
    names: Sequence[str],
    position: int,
    index: int,
    pair: PairScores,
    calibration: Calibration,
) -> ItemResult:
    scores = {name: calibration.evaluators[name].apply(pair.raw[name]) for name in names}
    whole = all(name in scores for name, weight in request.weights.items() if weight)
    # Of fewer evaluators it would be another number, however it was marked.
    reward = compose(scores, request.weights, request.normalization) if whole else None
    return ItemResult(index, reward, scores, pair.truncated_prompt, request.lossy[position])


DOWN = "evaluator_down"


def _down(names: list[str], wait_s: float) -> ProblemError:
    detail = f"out of service: {', '.join(names)}; ask for the others, or set allow_partial"
    return ProblemError(DOWN, detail, retry_after_s=max(1, round(wait_s)))
