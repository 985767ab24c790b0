"""Scores as the trainer sees them: arrays from a `Scorer`, which is the service or a test's fake."""

from collections.abc import Mapping, Sequence
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

Floats = NDArray[np.float64]
Images = NDArray[np.uint8]


class ScoringError(Exception):
    """The service gave no scores. `retryable` tells whether asking again can help.

    `outage` tells that asking for other images is no use either: nobody answers, or another service does.
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
    """Whoever judges images."""

    @property
    def evaluators(self) -> tuple[str, ...]:
        """Names of the K evaluators, in the order of the columns of `Scores`."""

    @property
    def identity(self) -> Mapping[str, str]:
        """Evaluator to fingerprint and calibration: what scores must share to be comparable."""

    def score(self, prompts: Sequence[str], images: Images) -> Scores:
        """Scores of N prompts with images (N, H, W, 3). Raises ScoringError; never returns a stand-in."""


class ServiceScorer:
    """The scoring service, known to be ready; may be shared by threads. A context manager."""

    def __init__(self, client: RewardClient, *, deterministic: bool = False) -> None:
        """Raises RewardClientError where the service does not say what it hosts."""
        self._client = client
        self._deterministic = deterministic
        described = client.evaluators().evaluators
        self.evaluators = tuple(sorted(described))
        self.identity = {name: f"{it.fingerprint}/{it.calibration}" for name, it in described.items()}

    @classmethod
    def connect(cls, config: ServiceConfig) -> Self:
        """Wait until the service is ready. Raises RewardClientError naming its address, in one line."""
        client = RewardClient(
            config.url,
            api_key=_read_key(config.api_key_file),
            client_id=config.client_id,
            timeout_s=config.timeout_s,
            retry_budget_s=config.retry_budget_s,
        )
        try:
            client.wait_until_ready(config.ready_timeout_s)
            return cls(client, deterministic=config.deterministic)
        except BaseException:
            client.close()
            raise

    def score(self, prompts: Sequence[str], images: Images) -> Scores:
        """See `Scorer.score`. The client has already asked again where its own retry budget allowed it."""
        try:
            response = self._client.score(
                prompts, list(images), normalization="z", deterministic=self._deterministic
            )
        except RewardClientError as error:
            raise ScoringError(str(error), retryable=_passing(error), outage=_outage(error)) from error
        changed = [
            name
            for name, it in response.evaluators.items()
            if self.identity.get(name) != f"{it.fingerprint}/{it.calibration}"
        ]
        if changed:
            raise ScoringError(
                f"the service's evaluators {', '.join(changed)} are no longer those the run began with",
                retryable=False,
                outage=True,
            )
        return read_scores(response, self.evaluators)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()


def _passing(error: RewardClientError) -> bool:
    """Whether it may be a fault of one batch that passes: a 500, or a score that is not a number.

    Where the client has spent its retry budget or its timeout, asking again would only double the wait.
    """
    if isinstance(error, ServiceError):
        return error.status >= 500 and not isinstance(error, OverloadedError)
    return isinstance(error, ProtocolError)


def _outage(error: RewardClientError) -> bool:
    """Whether the next micro-batch would fare no better: nobody is there, or the key is refused."""
    if isinstance(error, ServiceError):
        return error.status in (401, 403)
    return isinstance(error, UnreachableError)


def _read_key(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the service's key ({error}); see trainer.service") from error


def read_scores(response: ScoreResponse, evaluators: Sequence[str]) -> Scores:
    """The numbers of a response as arrays. Raises ScoringError for a missing or a non-finite one."""
    try:
        rows = [[result.scores[name] for name in evaluators] for result in response.results]
    except KeyError as error:
        raise ScoringError(f"the service left out evaluator {error}", retryable=False) from error
    raw = np.array([[score.raw for score in row] for row in rows], dtype=np.float64)
    z = np.array([[score.z for score in row] for row in rows], dtype=np.float64)
    return finite(Scores(raw, z))


def finite(scores: Scores) -> Scores:
    """The scores. Raises ScoringError where one is no number: it would pass for a group without variance."""
    if not all(np.isfinite(field).all() for field in scores):
        raise ScoringError("the service answered with a number that is not finite", retryable=True)
    return scores


def composite(z: Floats, evaluators: Sequence[str], weights: Mapping[str, float]) -> Floats:
    """Weighted mean of z over the last axis: (..., K) to (...)."""
    vector = weight_vector(evaluators, weights)
    mean: Floats = z @ vector / vector.sum()
    return mean


def weight_vector(evaluators: Sequence[str], weights: Mapping[str, float]) -> Floats:
    """Weights (K,) in the order of the evaluators; 0 for those that are not named."""
    return np.array([weights.get(name, 0.0) for name in evaluators], dtype=np.float64)
