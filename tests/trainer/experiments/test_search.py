"""A search end to end, on the tiny Karlo: null trial, pruning, winner, failures, going on."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.support.trainer.searching import POOL, TEST, found_in, search_config, searched
from tests.trainer.conftest import FakeScorer
from trainer.config import ConfigError, TrainerConfig
from trainer.experiments.experiment import Experiment
from trainer.experiments.ranking import choose
from trainer.experiments.search import search_winner
from trainer.experiments.workers import Job
from trainer.rl.rewards import Images, Scores, ScoringError
from trainer.runs.folder import METRICS_FILE
from trainer.runtime.errors import DivergenceError, EvaluationError, RolloutError

Make = Callable[..., TrainerConfig]


@pytest.fixture
def make(tmp_path: Path, karlo_folder: Path) -> Make:
    """Configurations of one experiment."""
    return lambda **changes: search_config(tmp_path, karlo_folder, **changes)


def experiment_of(config: TrainerConfig) -> Path:
    """Where its experiment is by default."""
    return config.runs_dir / f"{config.name}-experiment"


class Recorder(FakeScorer):
    """Remembers whose images it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def score(self, prompts: Sequence[str], images: Images) -> Scores:
        self.seen |= set(prompts)
        return super().score(prompts, images)


class Flattering(FakeScorer):
    """From its n-th answer on it likes everything better, by so much an image in the order it sees them."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self._rng, self._noise = np.random.default_rng(0), noise

    def score(self, prompts: Sequence[str], images: Images) -> Scores:
        raw, z = super().score(prompts, images)
        return Scores(raw, z + self._noise * self._rng.random(z.shape))


def test_a_search_tries_everything_once_and_goes_on_with_more_trials(make: Make) -> None:
    """Six trials are three and then three more; the test prompts are never drawn; the null gains nothing."""
    service = Recorder()
    first = searched(make(search={"trials": 2, "pruner": "none"}), service)
    more = searched(make(search={"trials": 3, "pruner": "none"}), service)
    assert [row["number"] for row in more["trials"]] == [0, 1, 2, 3]
    assert more["trials"][:3] == first["trials"]
    null = more["trials"][0]
    assert (null["null"], null["params"], null["value"], null["iterations"]) == (True, {}, 0.0, 0)
    assert all(row["state"] == "complete" and row["iterations"] == 2 for row in more["trials"][1:])
    assert len({row["params"]["update.learning_rate"] for row in more["trials"][1:]}) == 3
    assert service.seen <= set(POOL)
    assert not service.seen & set(TEST)
    before = service.calls
    assert searched(make(search={"trials": 3, "pruner": "none"}), service) == more
    assert service.calls == before  # all is finished: nothing is drawn again


def test_the_winner_is_measured_again_and_its_settings_are_handed_on(make: Make) -> None:
    """`selected` is the trial's own gain, `fresh` is not; the composite stays the experiment's."""
    space = {
        "update.learning_rate": {"low": 1e-2, "high": 3e-1, "log": True},
        "objective.weights.dark": {"low": 0.1, "high": 0.9},
    }
    config = make(search={"trials": 3, "pruner": "none", "space": space})
    found = searched(config)
    winner = found["winner"]
    assert winner is not None
    trials = {row["number"]: row for row in found["trials"]}
    assert winner["selected"]["difference"] == trials[winner["number"]]["value"] > 0
    assert winner["fresh"]["before"] != winner["selected"]["before"]
    settings = search_winner(Experiment.open(config), config, FakeScorer(), Console(quiet=True))
    assert settings == {**winner["params"], "evaluation.weights": {"red": 1.0}}
    # What `dark` weighs in a trial changes what it learns, not what it is compared by.
    run = experiment_of(config) / "search/trials/0001"
    compared = json.loads((run / "evaluation.json").read_text())["rows"]
    assert compared["composite"]["difference"] == pytest.approx(10 * compared["red"]["difference"])


def test_the_median_ends_trials_that_lag_behind(make: Make) -> None:
    """A pruned trial has ended early, says so, and does not win; evaluations are reported once each."""
    found = searched(make(search={"trials": 4, "iterations": 3, "warmup_trials": 1}))
    pruned = [row for row in found["trials"] if row["state"] == "pruned"]
    assert pruned
    for row in pruned:
        assert row["iterations"] < 3
        assert row["curve"][-1][0] == row["iterations"]
        assert row["reason"].startswith("median")
    for row in found["trials"][1:]:
        assert [step for step, _ in row["curve"]] == list(range(1, row["iterations"] + 1))
    assert found["winner"] is None or found["winner"]["number"] not in [row["number"] for row in pruned]


def test_a_judge_that_is_not_repeatable_shows_in_the_null_trial(make: Make) -> None:
    """The null trial gains something then: search.json and the console say so."""
    console = Console(file=io.StringIO(), width=400)
    found = searched(make(search={"trials": 1}), Flattering(noise=0.5), console=console)
    assert found["trials"][0]["value"] != 0
    warning = next(line for line in found["sentences"] if line.startswith("Warning: the null trial"))
    assert "not repeatable" in warning
    assert warning in console.file.getvalue()  # type: ignore[attr-defined]


def row(number: int, value: float | None, state: str = "complete", **more: Any) -> dict[str, Any]:
    """A trial of search.json."""
    return {"number": number, "state": state, "value": value, "null": number == 0, "reason": None, **more}


@pytest.mark.parametrize(
    ("trials", "winner"),
    [
        ([row(0, 0.0), row(1, 0.1), row(2, 0.3), row(3, 0.2)], 2),
        ([row(0, 0.0), row(1, -0.1), row(2, 0.0)], None),
        ([row(0, 0.25), row(1, 0.2)], None),
        ([row(0, 0.0), row(1, 0.9, reason="guard"), row(2, 0.9, "pruned"), row(3, 0.1)], 3),
        ([row(0, 0.0), row(1, None, "failed"), row(2, None, "running")], None),
        ([row(0, -0.5), row(1, -0.1)], None),
        ([], None),
    ],
)
def test_only_a_complete_honest_trial_that_gains_something_wins(
    trials: list[dict[str, Any]], winner: int | None
) -> None:
    """More than nothing and more than the null, neither pruned nor failed, and its guard did not trip."""
    chosen = choose(trials)
    assert (chosen and chosen["number"]) == winner


def test_without_a_winner_the_experiment_keeps_its_settings(make: Make) -> None:
    """A reward service that likes everything alike leaves nothing to win."""

    class Indifferent(FakeScorer):
        def score(self, prompts: Sequence[str], images: Images) -> Scores:
            return Scores(*(np.zeros((len(prompts), 2)) for _ in range(2)))

    config = make(search={"trials": 1})
    assert search_winner(Experiment.open(config), config, Indifferent(), Console(quiet=True)) == {}
    found = found_in(experiment_of(config))
    assert found["winner"] is None
    assert any("the experiment's own settings stay" in line for line in found["sentences"])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DivergenceError("the gradient is not finite"), "not finite"),
        (RolloutError("9 of 9 groups got no scores"), "no scores"),
    ],
)
def test_a_trial_that_fails_is_recorded_and_the_search_goes_on(
    make: Make, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    """The reason is in search.json; the next trials are tried all the same."""
    from trainer.experiments import trial as trying

    train = trying.train_run

    def failing(config: TrainerConfig, *arguments: Any, **keywords: Any) -> Any:
        if config.name == "0001":
            raise error
        return train(config, *arguments, **keywords)

    monkeypatch.setattr(trying, "train_run", failing)
    found = searched(make(search={"trials": 2}))
    assert [row["state"] for row in found["trials"]] == ["complete", "failed", "complete"]
    assert said in found["trials"][1]["reason"]


def test_an_outage_of_the_judge_fails_no_trial(make: Make) -> None:
    """The search stops, says that it can go on, and then ends as if nothing had happened."""
    config = make(search={"trials": 2, "pruner": "none"})
    whole = searched(config, path=config.runs_dir / "whole")
    answers = 0

    def gone(_: Sequence[str]) -> None:
        nonlocal answers
        answers += 1
        if answers > 4:  # the first trial has been trained, and is being evaluated
            raise ScoringError("nobody answers", retryable=False, outage=True)

    with pytest.raises((RolloutError, EvaluationError)) as stopped:
        searched(config, FakeScorer(gone), path=config.runs_dir / "broken")
    assert any("run again" in note for note in stopped.value.__notes__)
    states = [row["state"] for row in found_in(config.runs_dir / "broken")["trials"]]
    assert "failed" not in states
    after = searched(config, path=config.runs_dir / "broken")
    assert after["trials"] == whole["trials"]
    assert after["winner"] == whole["winner"]


def test_a_guard_that_trips_takes_the_trial_out(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial is complete, with the reason `guard`, and cannot win."""
    from trainer.evaluation.guard import GuardVerdict

    monkeypatch.setattr(GuardVerdict, "tripped", property(lambda verdict: verdict.looks > 0))
    found = searched(make(guard={"evaluator": "dark"}, search={"trials": 1, "null_trial": False}))
    assert [(row["state"], row["reason"], row["null"]) for row in found["trials"]] == [
        ("complete", "guard", False)
    ]
    assert found["winner"] is None
    assert any("the guard fell" in line for line in found["sentences"])


@pytest.mark.parametrize(
    ("space", "said"),
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
        ({"lora.alpha": {"choices": [1], "times": "lora.rnk"}}, "lora.rnk, which is no setting"),
        ({"lora.alpha": {"choices": [1], "times": "lora.targets"}}, "not all of these are numbers"),
        (
            {"rollout.prompts_per_iteration": {"choices": [7], "over": "rollout.images_per_prompt"}},
            r"space\.rollout\.prompts_per_iteration: .*3\.5",
        ),
        (
            {"rollout.share": {"choices": [{}]}, "rollout.share.prior": {"choices": ["image"]}},
            "is a part of it",
        ),
    ],
)
def test_a_space_that_cannot_be_tried_is_refused_before_anything_is_trained(
    make: Make, space: dict[str, Any], said: str
) -> None:
    """One line that names the key of the space."""
    config = make(search={})
    rules = config.search.model_copy(update={"space": type(config.search)(space=space).space})
    service = FakeScorer()
    with pytest.raises(ConfigError, match=said) as refused:
        searched_without_file(config.model_copy(update={"search": rules}), service)
    assert "\n" not in str(refused.value)
    assert service.calls == 0


def searched_without_file(config: TrainerConfig, service: FakeScorer) -> None:
    """As `searched`, where no search.json is to come of it."""
    from trainer.experiments.search import search

    search(Experiment.open(config), config, service, Console(quiet=True))


def test_relations_keep_the_scale_of_the_adapter_and_the_images_of_an_iteration(make: Make) -> None:
    """alpha is a multiple of the trial's own rank; prompts times images is the same in every trial."""
    space = {
        "lora.rank": {"choices": [1, 2, 4]},
        "lora.alpha": {"choices": [2], "times": "lora.rank"},
        "rollout.images_per_prompt": {"choices": [2, 4]},
        "rollout.prompts_per_iteration": {"choices": [8], "over": "rollout.images_per_prompt"},
    }
    config = make(search={"trials": 2, "iterations": 1, "space": space, "null_trial": False})
    for tried in (row["params"] for row in searched(config)["trials"]):
        assert tried["lora.alpha"] == 2 * tried["lora.rank"]
        assert tried["rollout.prompts_per_iteration"] * tried["rollout.images_per_prompt"] == 8
        assert isinstance(tried["rollout.prompts_per_iteration"], int)


def test_workers_ask_the_judge_of_their_own_search(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever search beside it was the last to write the file that workers read."""
    jobs: list[Job] = []
    monkeypatch.setattr("trainer.experiments.search.run_side_by_side", lambda some, *_: jobs.extend(some))
    config = make(search={"workers": 2, "trials": 1}, service={"url": "http://127.0.0.1:7001"})
    searched(config)
    assert len(jobs) == 2
    assert all("service.url=http://127.0.0.1:7001" in job.command for job in jobs)


def test_a_trial_that_was_trained_but_not_told_is_told(make: Make) -> None:
    """A study that was lost is filled from the run folders: nothing is trained or evaluated again."""
    config = make(search={"trials": 2, "iterations": 3})
    found = searched(config)
    folder = experiment_of(config)
    (folder / "search/study.db").unlink()
    service = FakeScorer()
    assert searched(config, service) == found
    assert service.calls == 0
    assert (folder / "search/trials/0001" / METRICS_FILE).exists()
