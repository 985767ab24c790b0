"""Build the response to a score request from raw scores, for the service and the command line. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from reward_service.engine.types import PairScores
from reward_service.protocol import EvaluatorIdentity, ItemResult, ProblemError, ScoreResponse
from reward_service.requests.parsing import DecodedRequest
from reward_service.scheduler.requests import Completed
from reward_service.scoring.calibration import Calibration, compute_reward

EVALUATOR_DOWN = "evaluator_down"


def build_response(
    request: DecodedRequest,
    completed: Completed[PairScores],
    *,
    request_id: str,
    fingerprints: Mapping[str, str],
    calibration: Calibration,
    total_s: float,
    retry_after_s: int,
) -> ScoreResponse:
    """Return the response to a request whose pairs were scored.

    Args:
        request: the request
        completed: raw scores of its pairs, in order
        request_id: its ID
        fingerprints: of all loaded evaluators, by name
        calibration: scales of the raw scores
        total_s: seconds from the received body to the finished scores
        retry_after_s: for the problem, in seconds

    Raises:
        ProblemError: `evaluator_down` if an evaluator failed and the request does not allow partial results,
            or if all evaluators failed
    """
    names = working_evaluators(request, completed.results)
    failed = {name: EVALUATOR_DOWN for name in request.evaluators if name not in names}
    if failed and (not request.allow_partial or not names):
        raise evaluator_down(list(failed), retry_after_s)
    seconds = durations(request, completed) | {"total": total_s}
    return ScoreResponse(
        request_id,
        item_results(request, completed.results, calibration),
        identities({name: fingerprints[name] for name in names}, calibration),
        {name: round(1000 * value, 3) for name, value in seconds.items()},
        failed,
    )


def durations(request: DecodedRequest, completed: Completed[PairScores]) -> dict[str, float]:
    """Return the seconds of each stage of a request, in order."""
    return {"decode": request.decode_s, "queue": completed.queued_s, "run": completed.run_s}


def item_results(
    request: DecodedRequest, scored: Sequence[PairScores], calibration: Calibration, first: int = 0
) -> list[ItemResult]:
    """Return the results of pairs of a request, with the scores of the evaluators that scored every pair.

    Args:
        request: the request
        scored: raw scores of its pairs
        calibration: scales of the raw scores
        first: index of the first pair in the whole batch
    """
    names = working_evaluators(request, scored)
    return [
        _item_result(request, names, position, first + position, pair, calibration)
        for position, pair in enumerate(scored)
    ]


def working_evaluators(request: DecodedRequest, scored: Sequence[PairScores]) -> tuple[str, ...]:
    """Return the evaluators that scored every pair; one that failed on any pair is excluded from all."""
    failed = {name for pair in scored for name in pair.failed}
    return tuple(name for name in request.evaluators if name not in failed)


def identities(fingerprints: Mapping[str, str], calibration: Calibration) -> dict[str, EvaluatorIdentity]:
    """Return fingerprint and calibration of each evaluator."""
    return {
        name: EvaluatorIdentity(fingerprint, calibration.evaluators[name].identity)
        for name, fingerprint in fingerprints.items()
    }


def evaluator_down(names: Sequence[str], wait_s: float) -> ProblemError:
    """Return the problem for evaluators that are out of service.

    Args:
        names: the evaluators
        wait_s: seconds until they are tried again
    """
    detail = f"out of service: {', '.join(names)}; request the other evaluators, or set allow_partial"
    return ProblemError(EVALUATOR_DOWN, detail, retry_after_s=max(1, round(wait_s)))


def deadline_exceeded() -> ProblemError:
    """Return the problem for a request that was not scored before its deadline."""
    return ProblemError("deadline_exceeded", "the request was not scored within X-Deadline-Ms")


def _item_result(
    request: DecodedRequest,
    names: Sequence[str],
    position: int,
    index: int,
    pair: PairScores,
    calibration: Calibration,
) -> ItemResult:
    scores = {name: calibration.evaluators[name].apply(pair.raw[name]) for name in names}
    complete = all(name in scores for name, weight in request.weights.items() if weight)
    # A mean over fewer evaluators would be another quantity, even if it were marked as partial.
    reward = compute_reward(scores, request.weights, request.normalization) if complete else None
    return ItemResult(index, reward, scores, pair.truncated_prompt, request.lossy[position])
