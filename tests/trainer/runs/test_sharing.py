"""Variance within a prompt that shared random numbers remove, and its interval."""

import json

import numpy as np
import pytest

from tests.trainer.conftest import PROMPTS, FakeScorer
from tests.trainer.rl.test_train import with_changes
from trainer.config import TrainerConfig
from trainer.rl.rewards import Images, Scores, ScoringError
from trainer.rl.sampler import ImageSampler
from trainer.runs.studies import SharingReport, measure_sharing, sharing_table, variance_removed
from trainer.runtime.errors import EvaluationError


def groups(prompts: int, images: int, removed: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return within-group variances of a world in which sharing removes this share of the variance."""
    rng = np.random.default_rng(seed)
    scale = rng.gamma(4.0, 0.25, (prompts, 1))  # some prompts vary more than others
    own = rng.normal(size=(prompts, images)) * (1 - removed) ** 0.5
    common = rng.normal(size=(prompts, images)) * removed**0.5
    return (scale * own).var(axis=1, ddof=1), (scale * (own + common)).var(axis=1, ddof=1)


@pytest.mark.parametrize("removed", [0.0, 0.4, 0.9])
def test_variance_removed_estimates_a_known_share(removed: float) -> None:
    """The estimate is right on average, and 95 % intervals cover about 95 %."""
    found = [variance_removed(*groups(40, 8, removed, seed)) for seed in range(100)]
    shares = np.array([result.share for result in found])
    assert abs(shares.mean() - removed) < 4 * max(shares.std(), 1e-9) / 10 + 1e-9
    covered = np.mean([result.low - 1e-9 <= removed <= result.high + 1e-9 for result in found])
    assert covered >= 0.85


def test_variance_removed_without_variance_is_nan() -> None:
    """0/0 is NaN, not an error."""
    assert np.isnan(variance_removed(np.zeros(5), np.zeros(5)).share)
    assert np.isnan(variance_removed(np.ones(1), np.ones(1)).share)


def test_sharing_report_without_variance_is_valid_json() -> None:
    """One prompt, or an evaluator that never varies, is null in sharing.json and does not stop a run."""
    report = SharingReport({"as configured": {"red": variance_removed(np.ones(1), np.ones(1))}}, 1, 4, 0.95)
    written = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert written["removed"]["as configured"]["red"] == {"share": None, "low": None, "high": None}


def test_measure_sharing_of_generated_images(sampler: ImageSampler, trainer_config: TrainerConfig) -> None:
    """Shared randomness lowers the variance; nothing shared leaves it as it is."""
    nothing = with_changes(
        trainer_config,
        rollout__share__prior="image",
        rollout__share__decoder_start="image",
        rollout__share__super_res="image",
    )
    none = measure_sharing(sampler, FakeScorer(), PROMPTS, nothing, each=True)
    assert none.removed["as configured"]["composite"] == (0.0, 0.0, 0.0)
    assert list(none.removed) == ["as configured"]
    report = measure_sharing(sampler, FakeScorer(), PROMPTS, trainer_config, each=True)
    assert list(report.removed) == ["as configured", "prior alone", "decoder_start alone", "super_res alone"]
    assert list(report.removed["as configured"]) == ["dark", "red", "composite"]
    assert report.removed["as configured"]["composite"].share > 0.1
    values = report.to_dict()
    assert values["removed"]["prior alone"]["red"].keys() == {"share", "low", "high"}
    assert sharing_table(report).row_count == 4 * 3


def test_measure_sharing_raises_if_scoring_fails(
    sampler: ImageSampler, trainer_config: TrainerConfig
) -> None:
    """No share is computed from missing scores."""

    class Failing(FakeScorer):
        def score(self, prompts: list[str], images: Images) -> Scores:
            raise ScoringError("no service", retryable=False)

    with pytest.raises(EvaluationError, match="no service"):
        measure_sharing(sampler, Failing(), PROMPTS, trainer_config)
