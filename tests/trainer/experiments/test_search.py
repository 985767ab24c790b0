"""Search end to end on the tiny Karlo: null trial, pruning, winner, failures, resuming."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.support.trainer.search_runs import POOL, TEST, read_results, run_search, search_config
from tests.trainer.conftest import FakeScorer
from trainer.config import ConfigError, TrainerConfig
from trainer.experiments.experiment import Experiment
from trainer.experiments.search import search, search_winner
from trainer.experiments.trial import State, Trial, choose_winner
from trainer.experiments.workers import WorkerCommand
from trainer.rl.rewards import Images, Scores, ScoringError
from trainer.runs.folder import METRICS_FILE
from trainer.runtime.errors import DivergenceError, EvaluationError, RolloutError

Make = Callable[..., TrainerConfig]


@pytest.fixture
def make(tmp_path: Path, karlo_folder: Path) -> Make:
    """Return a function that makes configurations of one experiment."""
    return lambda **changes: search_config(tmp_path, karlo_folder, **changes)


def experiment_folder(config: TrainerConfig) -> Path:
    """Return the default folder of its experiment."""
    return config.runs_dir / f"{config.name}-experiment"


class RecordingScorer(FakeScorer):
    """Records the prompts of its requests."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts: set[str] = set()

    def score(self, prompts: Sequence[str], images: Images) -> Scores:
        self.prompts |= set(prompts)
        return super().score(prompts, images)


class NoisyScorer(FakeScorer):
    """Adds random noise, from 0 to `noise`, to every score."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self._rng, self._noise = np.random.default_rng(0), noise

    def score(self, prompts: Sequence[str], images: Images) -> Scores:
        raw, z = super().score(prompts, images)
        return Scores(raw, z + self._noise * self._rng.random(z.shape))


def test_search_resumes_with_more_trials(make: Make) -> None:
    """Finished trials are not repeated; the test prompts are never used; the null trial gains nothing."""
    service = RecordingScorer()
    first = run_search(make(search={"trials": 2, "pruner": "none"}), service)
    more = run_search(make(search={"trials": 3, "pruner": "none"}), service)
    assert [row["number"] for row in more["trials"]] == [0, 1, 2, 3]
    assert more["trials"][:3] == first["trials"]
    null = more["trials"][0]
    assert (null["null"], null["params"], null["value"], null["iterations"]) == (True, {}, 0.0, 0)
    assert all(row["state"] == "complete" and row["iterations"] == 2 for row in more["trials"][1:])
    assert len({row["params"]["update.learning_rate"] for row in more["trials"][1:]}) == 3
    assert service.prompts <= set(POOL)
    assert not service.prompts & set(TEST)
    before = service.calls
    assert run_search(make(search={"trials": 3, "pruner": "none"}), service) == more
    assert service.calls == before  # everything is finished: no image is generated


def test_winner_is_measured_again_and_its_settings_are_returned(make: Make) -> None:
    """`selected` is the trial's own gain, `fresh` a new one; the composite stays the experiment's."""
    space = {
        "update.learning_rate": {"low": 1e-2, "high": 3e-1, "log": True},
        "objective.weights.dark": {"low": 0.1, "high": 0.9},
    }
    config = make(search={"trials": 3, "pruner": "none", "space": space})
    found = run_search(config)
    winner = found["winner"]
    assert winner is not None
    trials = {row["number"]: row for row in found["trials"]}
    assert winner["selected"]["difference"] == trials[winner["number"]]["value"] > 0
    assert winner["fresh"]["before"] != winner["selected"]["before"]
    settings = search_winner(Experiment.open(config), config, FakeScorer(), Console(quiet=True))
    assert settings == {**winner["params"], "evaluation.weights": {"red": 1.0}}
    # The weight of `dark` in a trial changes the training, not the comparison of trials.
    run = experiment_folder(config) / "search/trials/0001"
    compared = json.loads((run / "evaluation.json").read_text())["rows"]
    assert compared["composite"]["difference"] == pytest.approx(10 * compared["red"]["difference"])


def test_median_pruner_ends_trials_below_the_median(make: Make) -> None:
    """A pruned trial ends early with a reason, and cannot win; each evaluation is reported once."""
    found = run_search(make(search={"trials": 4, "iterations": 3, "warmup_trials": 1}))
    pruned = [row for row in found["trials"] if row["state"] == "pruned"]
    assert pruned
    for row in pruned:
        assert row["iterations"] < 3
        assert row["curve"][-1][0] == row["iterations"]
        assert row["reason"].startswith("median")
    for row in found["trials"][1:]:
        assert [step for step, _ in row["curve"]] == list(range(1, row["iterations"] + 1))
    assert found["winner"] is None or found["winner"]["number"] not in [row["number"] for row in pruned]


def test_null_trial_shows_scores_that_are_not_repeatable(make: Make) -> None:
    """If the null trial gains something, search.json and the console contain a warning."""
    console = Console(file=io.StringIO(), width=400)
    found = run_search(make(search={"trials": 1}), NoisyScorer(noise=0.5), console=console)
    assert found["trials"][0]["value"] != 0
    warning = next(line for line in found["sentences"] if line.startswith("Warning: the null trial"))
    assert "not repeatable" in warning
    assert warning in console.file.getvalue()  # type: ignore[attr-defined]


def trial(number: int, value: float | None, state: State = "complete", reason: str | None = None) -> Trial:
    """Return a trial with this result; number 0 is the null trial."""
    return Trial(number, state, {}, value, None, None, 2, reason, number == 0, ())


@pytest.mark.parametrize(
    ("trials", "winner"),
    [
        ([trial(0, 0.0), trial(1, 0.1), trial(2, 0.3), trial(3, 0.2)], 2),
        ([trial(0, 0.0), trial(1, -0.1), trial(2, 0.0)], None),
        ([trial(0, 0.25), trial(1, 0.2)], None),
        ([trial(0, 0.0), trial(1, 0.9, reason="guard"), trial(2, 0.9, "pruned"), trial(3, 0.1)], 3),
        ([trial(0, 0.0), trial(1, None, "failed"), trial(2, None, "running")], None),
        ([trial(0, -0.5), trial(1, -0.1)], None),
        ([], None),
    ],
)
def test_choose_winner_wants_the_best_complete_trial_with_a_gain(
    trials: list[Trial], winner: int | None
) -> None:
    """It gains more than 0 and than the null trial, is not pruned or failed, and its guard did not trip."""
    chosen = choose_winner(trials)
    assert (chosen and chosen.number) == winner


def test_search_without_winner_returns_no_settings(make: Make) -> None:
    """If all images have equal scores, no trial gains anything."""

    class ConstantScorer(FakeScorer):
        def score(self, prompts: Sequence[str], images: Images) -> Scores:
            return Scores(*(np.zeros((len(prompts), 2)) for _ in range(2)))

    config = make(search={"trials": 1})
    assert search_winner(Experiment.open(config), config, ConstantScorer(), Console(quiet=True)) == {}
    found = read_results(experiment_folder(config))
    assert found["winner"] is None
    assert any("the experiment's own settings stay" in line for line in found["sentences"])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DivergenceError("the gradient is not finite"), "not finite"),
        (RolloutError("9 of 9 groups got no scores"), "no scores"),
    ],
)
def test_failed_trial_is_recorded_and_the_search_continues(
    make: Make, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    """The reason is in search.json, and the other trials are run."""
    from trainer.experiments import run_trial

    train = run_trial.train_run

    def failing(config: TrainerConfig, *arguments: Any, **keywords: Any) -> Any:
        if config.name == "0001":
            raise error
        return train(config, *arguments, **keywords)

    monkeypatch.setattr(run_trial, "train_run", failing)
    found = run_search(make(search={"trials": 2}))
    assert [row["state"] for row in found["trials"]] == ["complete", "failed", "complete"]
    assert message in found["trials"][1]["reason"]


@pytest.mark.slow
def test_service_outage_fails_no_trial(make: Make) -> None:
    """The search stops with advice to run it again, and then ends with the results of an undisturbed one."""
    config = make(search={"trials": 2, "pruner": "none"})
    whole = run_search(config, path=config.runs_dir / "whole")
    requests = 0

    def outage(_: Sequence[str]) -> None:
        nonlocal requests
        requests += 1
        if requests > 4:  # the first trial has been trained, and is being evaluated
            raise ScoringError("no response", retryable=False, outage=True)

    with pytest.raises((RolloutError, EvaluationError)) as stopped:
        run_search(config, FakeScorer(outage), path=config.runs_dir / "broken")
    assert any("run again" in note for note in stopped.value.__notes__)
    states = [row["state"] for row in read_results(config.runs_dir / "broken")["trials"]]
    assert "failed" not in states
    after = run_search(config, path=config.runs_dir / "broken")
    assert after["trials"] == whole["trials"]
    assert after["winner"] == whole["winner"]


def test_trial_with_a_tripped_guard_cannot_win(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial is complete, with the reason `guard`."""
    from trainer.evaluation.guard import GuardVerdict

    monkeypatch.setattr(GuardVerdict, "tripped", property(lambda verdict: verdict.looks > 0))
    found = run_search(make(guard={"evaluator": "dark"}, search={"trials": 1, "null_trial": False}))
    assert [(row["state"], row["reason"], row["null"]) for row in found["trials"]] == [
        ("complete", "guard", False)
    ]
    assert found["winner"] is None
    assert any("the guard fell" in line for line in found["sentences"])


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "nothing to search"),
        ({"lora.rnk": {"choices": [2]}}, r"space\.lora\.rnk: .*did you mean 'rank'"),
        ({"lora.rank": {"choices": [2, 0]}}, r"space\.lora\.rank: .*greater than 0 \(found 0\)"),
        ({"lora.rank": {"low": 2, "high": 9}}, "add integer: true"),
        ({"update.schedule": {"choices": ["linear", "stairs"]}}, r"space\.update\.schedule: .*'stairs'"),
        ({"objective.weights.green": {"low": 0, "high": 1}}, "the service has no evaluator green"),
        ({"objective.weights.red": {"low": 0, "high": 1}}, "at least one evaluator needs a weight"),
        ({"evaluation.images_per_prompt": {"choices": [2]}}, "a search varies settings below lora"),
        ({"seed": {"choices": [1, 2]}}, "a search varies settings below lora"),
        ({"lora.alpha": {"choices": [1], "times": "lora.rnk"}}, "lora.rnk, which is not a setting"),
        ({"lora.alpha": {"choices": [1], "times": "lora.targets"}}, "not all values are numbers"),
        (
            {"rollout.prompts_per_iteration": {"choices": [7], "over": "rollout.images_per_prompt"}},
            r"space\.rollout\.prompts_per_iteration: .*3\.5",
        ),
        (
            {"rollout.share": {"choices": [{}]}, "rollout.share.prior": {"choices": ["image"]}},
            r"space\.rollout\.share: contains rollout\.share\.prior",
        ),
    ],
)
def test_invalid_space_is_refused_before_training(make: Make, space: dict[str, Any], message: str) -> None:
    """The message is one line that names the key of the space."""
    config = make(search={})
    search_settings = config.search.model_copy(update={"space": type(config.search)(space=space).space})
    service = FakeScorer()
    with pytest.raises(ConfigError, match=message) as refused:
        run_without_results(config.model_copy(update={"search": search_settings}), service)
    assert "\n" not in str(refused.value)
    assert service.calls == 0


def run_without_results(config: TrainerConfig, service: FakeScorer) -> None:
    """Run the search without reading search.json."""
    search(Experiment.open(config), config, service, Console(quiet=True))


def test_relative_settings_follow_the_values_of_their_trial(make: Make) -> None:
    """alpha is a multiple of the trial's own rank; prompts times images is the same in every trial."""
    space = {
        "lora.rank": {"choices": [1, 2, 4]},
        "lora.alpha": {"choices": [2], "times": "lora.rank"},
        "rollout.images_per_prompt": {"choices": [2, 4]},
        "rollout.prompts_per_iteration": {"choices": [8], "over": "rollout.images_per_prompt"},
    }
    config = make(search={"trials": 2, "iterations": 1, "space": space, "null_trial": False})
    for params in (row["params"] for row in run_search(config)["trials"]):
        assert params["lora.alpha"] == 2 * params["lora.rank"]
        assert params["rollout.prompts_per_iteration"] * params["rollout.images_per_prompt"] == 8
        assert isinstance(params["rollout.prompts_per_iteration"], int)


def test_workers_use_the_reward_service_of_their_own_search(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A simultaneous search may have overwritten the file that workers read."""
    jobs: list[WorkerCommand] = []
    monkeypatch.setattr(
        "trainer.experiments.search.run_side_by_side", lambda started, *_: jobs.extend(started)
    )
    config = make(search={"workers": 2, "trials": 1}, service={"url": "http://127.0.0.1:7001"})
    run_search(config)
    assert len(jobs) == 2
    assert all("service.url=http://127.0.0.1:7001" in job.command for job in jobs)


def test_lost_study_is_restored_from_the_run_folders(make: Make) -> None:
    """Nothing is trained or evaluated again."""
    config = make(search={"trials": 2, "iterations": 3})
    found = run_search(config)
    folder = experiment_folder(config)
    (folder / "search/study.db").unlink()
    service = FakeScorer()
    assert run_search(config, service) == found
    assert service.calls == 0
    assert (folder / "search/trials/0001" / METRICS_FILE).exists()
