"""Scores as arrays, from the reward service or any other `Scorer`."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from reward_service.client import (
    OverloadedError,
    ProtocolError,
    RewardClient,
    RewardClientError,
    ServiceError,
    UnreachableError,
)
from reward_service.protocol import ScoreResponse
from trainer.config import ConfigError, ServiceConfig
from trainer.runtime.distributed import is_first_of_job

Floats = NDArray[np.float64]
Images = NDArray[np.uint8]


class ScoringError(Exception):
    """Scoring failed.

    Attributes:
        retryable: the same request may succeed when sent again
        outage: requests for other images would fail too: the service is unreachable, refuses the API key, or
            has other evaluators than before
    """

    def __init__(self, message: str, *, retryable: bool, outage: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable
        self.outage = outage


class Scores(NamedTuple):
    """Scores of N images by K evaluators, in the scorer's order of evaluators; all finite."""

    raw: Floats  # (N, K) the evaluators' own numbers
    z: Floats  # (N, K) in calibrated deviations


class Scorer(Protocol):
    """Scores images; implemented by `ServiceScorer` and by fakes in tests."""

    @property
    def evaluators(self) -> tuple[str, ...]:
        """Names of the K evaluators, in the order of the columns of `Scores`."""

    @property
    def identity(self) -> Mapping[str, str]:
        """Fingerprint and calibration by evaluator; only scores of equal identity are comparable."""

    def score(self, prompts: Sequence[str], images: Images) -> Scores:
        """Return the scores of N prompts with images (N, H, W, 3).

        Raises:
            ScoringError: any score is missing; placeholders are never returned
        """


def _print_line(line: str) -> None:
    if is_first_of_job():
        print(line, file=sys.stderr, flush=True)


class ServiceScorer:
    """Scorer that uses the reward service; thread-safe. A context manager."""

    def __init__(self, client: RewardClient, *, deterministic: bool = False) -> None:
        """Read the service's evaluators. Raises RewardClientError if that fails."""
        self._client = client
        self._deterministic = deterministic
        descriptions = client.evaluators().evaluators
        self.evaluators = tuple(sorted(descriptions))
        self.identity = {name: f"{it.fingerprint}/{it.calibration}" for name, it in descriptions.items()}

    @classmethod
    def connect(cls, config: ServiceConfig, report: Callable[[str], None] = _print_line) -> Self:
        """Connect and wait until the service is ready.

        Args:
            config: address, key and timeouts of the service
            report: receives a line if the service is not ready at once: its address, any proxy, its state

        Raises:
            RewardClientError: the service is not ready in time; one line with its address
            ConfigError: the API key file cannot be read
        """
        client = RewardClient(
            config.url,
            api_key=_read_key(config.api_key_file),
            client_id=config.client_id,
            timeout_s=config.timeout_s,
            retry_budget_s=config.retry_budget_s,
        )
        try:
            client.wait_until_ready(config.ready_timeout_s, report)
            return cls(client, deterministic=config.deterministic)
        except BaseException:
            client.close()
            raise

    def score(self, prompts: Sequence[str], images: Images) -> Scores:
        """See `Scorer.score`. The client has already retried within its own retry budget."""
        try:
            response = self._client.score(
                prompts, list(images), normalization="z", deterministic=self._deterministic
            )
        except RewardClientError as error:
            raise ScoringError(
                str(error), retryable=_is_transient(error), outage=_is_outage(error)
            ) from error
        changed = sorted(
            name
            for name, it in response.evaluators.items()
            if self.identity.get(name) != f"{it.fingerprint}/{it.calibration}"
        )
        if changed:
            raise ScoringError(
                f"the reward service's evaluators {', '.join(changed)} changed during the run; "
                "restore the service's models and calibration, or start a new run",
                retryable=False,
                outage=True,
            )
        return read_scores(response, self.evaluators)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()


def _is_transient(error: RewardClientError) -> bool:
    """Return whether the error may affect this request only: a 500, or a score that is not a number.

    After the client has spent its retry budget or its timeout, another attempt would only double the wait.
    """
    if isinstance(error, ServiceError):
        return error.status >= 500 and not isinstance(error, OverloadedError)
    return isinstance(error, ProtocolError)


def _is_outage(error: RewardClientError) -> bool:
    """Return whether the next micro-batch would fail too: service unreachable, or API key refused."""
    if isinstance(error, ServiceError):
        return error.status in (401, 403)
    return isinstance(error, UnreachableError)


def _read_key(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot read the API key ({error}); set trainer.service.api_key_file"
        ) from error


def read_scores(response: ScoreResponse, evaluators: Sequence[str]) -> Scores:
    """Return the scores of a response as arrays. Raises ScoringError if one is missing or not finite."""
    try:
        rows = [[result.scores[name] for name in evaluators] for result in response.results]
    except KeyError as error:
        raise ScoringError(f"the response lacks scores of evaluator {error}", retryable=False) from error
    raw = np.array([[score.raw for score in row] for row in rows], dtype=np.float64)
    z = np.array([[score.z for score in row] for row in rows], dtype=np.float64)
    return require_finite(Scores(raw, z))


def require_finite(scores: Scores) -> Scores:
    """Return the scores unchanged. Raises ScoringError if one is not finite.

    A NaN would make its group look as if it had no variance.
    """
    if not all(np.isfinite(field).all() for field in scores):
        raise ScoringError("the response contains a score that is not finite", retryable=True)
    return scores


def composite(z: Floats, evaluators: Sequence[str], weights: Mapping[str, float]) -> Floats:
    """Return the weighted mean of z (..., K) over the last axis, (...)."""
    vector = weight_vector(evaluators, weights)
    mean: Floats = z @ vector / vector.sum()
    return mean


def weight_vector(evaluators: Sequence[str], weights: Mapping[str, float]) -> Floats:
    """Return the weights (K,) in the order of the evaluators; 0 for those not named."""
    return np.array([weights.get(name, 0.0) for name in evaluators], dtype=np.float64)
