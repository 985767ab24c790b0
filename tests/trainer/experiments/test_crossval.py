"""Cross-validation on the tiny Karlo: folds, early stopping, guard, one measurement on the test prompts."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.torch import load_file

from tests.support.trainer.fitted_karlo import LEARNABLE
from tests.trainer.conftest import SAMPLING, FakeScorer
from trainer.config import LORA_FILE, ConfigError, TrainerConfig, with_values
from trainer.data.splits import Split
from trainer.experiments.crossval import cross_validate
from trainer.experiments.experiment import Experiment
from trainer.rl.rewards import Images, Scores
from trainer.runs.checkpoints import decode, read_stored
from trainer.runs.folder import RunFolder
from trainer.runs.train import train_run
from trainer.runtime.errors import GuardError

COLOURS = ("red", "blue", "green", "black", "white", "orange")
THINGS = ("ring on a hill", "cross by the sea", "star over a town")
POOL = tuple(f"one {colour} {thing}" for colour in COLOURS for thing in THINGS)
TEST = tuple(f"a quiet {thing} under a wide {colour} sky" for colour in COLOURS[:4] for thing in THINGS)


@pytest.fixture
def config(tmp_path: Path, karlo_folder: Path) -> TrainerConfig:
    """Return a configuration of three folds with two evaluations each; a run takes seconds."""
    (tmp_path / "train.txt").write_text("\n".join(POOL))
    (tmp_path / "test.txt").write_text("\n".join(TEST))
    return TrainerConfig.model_validate(
        {
            "name": "tiny",
            "runs_dir": tmp_path / "runs",
            "iterations": 4,
            "threads": 1,
            "karlo": {"path": karlo_folder},
            "prompts": {"train": tmp_path / "train.txt", "test": tmp_path / "test.txt"},
            "sampling": SAMPLING.model_dump() | {"decoder_steps": 5, "micro_batch": 8},
            "lora": {"rank": 2, "alpha": 2, "ema_decay": 0.0},
            "objective": {"weights": {"red": 1.0}},
            "rollout": {"prompts_per_iteration": 2, "images_per_prompt": 4},
            "update": {"learning_rate": 5e-3},
            "evaluation": {"every": 2, "images_per_prompt": 2, "resamples": 200},
            "early_stopping": {"patience": 2},
            "crossval": {"folds": 3},
        }
    )


def learnable(config: TrainerConfig, karlo: Path, changes: Mapping[str, Any]) -> TrainerConfig:
    """Return the configuration with a Karlo and settings with which training has an effect."""
    settings = {key.replace("__", "."): value for key, value in LEARNABLE.items()}
    more = {"karlo.path": str(karlo), "crossval.folds": 2, "checkpoints.keep": 100}
    more |= {"iterations": 15, "evaluation.every": 5, "evaluation.images_per_prompt": 4}
    more |= {"early_stopping.patience": 0, "sampling.decoder_steps": SAMPLING.decoder_steps}
    return with_values(config, settings | more | dict(changes))


def crossval(config: TrainerConfig, scorer: FakeScorer | None = None, path: Path | None = None) -> Path:
    """Start or resume the experiment; return its folder."""
    experiment = Experiment.open(config, path)
    cross_validate(experiment, config, scorer or FakeScorer(), Console(quiet=True), ())
    return experiment.path


def results(path: Path) -> dict[str, Any]:
    """Return the content of crossval.json and test.json."""
    return {name: json.loads((path / name).read_text()) for name in ("crossval.json", "test.json")}


class RecordingScorer(FakeScorer):
    """Records the prompts of each request."""

    def __init__(self, fault: Callable[[Sequence[str]], None] = len) -> None:  # type: ignore[assignment]
        super().__init__(fault)
        self.requests: list[frozenset[str]] = []

    def score(self, prompts: Sequence[str], images: Images) -> Scores:
        self.requests.append(frozenset(prompts))
        return super().score(prompts, images)


@pytest.mark.slow
def test_test_prompts_are_scored_after_all_folds(config: TrainerConfig) -> None:
    """Every other prompt is validated in one fold; the final fit trains on all of them."""
    scorer = RecordingScorer()
    path = crossval(config, scorer)
    folds, test = results(path)["crossval.json"], results(path)["test.json"]
    assert sum(fold["prompts"] for fold in folds["folds"]) == len(POOL) == folds["pooled"]["prompts"]
    assert test["prompts"] == len(TEST)
    with_test = [bool(prompts & set(TEST)) for prompts in scorer.requests]
    assert not any(with_test[: with_test.index(True)])
    before_test = set().union(*scorer.requests[: with_test.index(True)])
    assert before_test == set(POOL)
    kept = json.loads((path / "final" / "prompts.json").read_text())
    assert set(kept["train"]) == set(POOL)
    assert set(kept["validation"]) == set(TEST)
    finished = json.loads((path / "final" / "finished.json").read_text())
    assert finished["done"] == finished["reached"] == folds["chosen_iterations"]


@pytest.mark.slow
def test_finished_experiment_is_not_repeated(config: TrainerConfig) -> None:
    """The same command then requests no scores."""
    first = results(crossval(config))
    scorer = RecordingScorer()
    assert results(crossval(config, scorer)) == first
    assert scorer.requests == []


@pytest.mark.slow
def test_deleted_results_of_a_fold_are_restored(config: TrainerConfig) -> None:
    """They are computed from the checkpoints, with the same numbers, as the message on damaged files says."""
    path = crossval(config)
    first = results(path)
    for name in ("tuned.npz", "evaluation.json"):
        (path / "folds" / "1" / name).unlink()
        assert results(crossval(config)) == first


@pytest.mark.slow
def test_interrupted_experiment_ends_with_the_same_numbers(config: TrainerConfig, tmp_path: Path) -> None:
    """It is interrupted in the first fold, in a later one, and in the final fit."""

    class InterruptedByTest(BaseException):
        pass

    counting = FakeScorer()
    whole = results(crossval(config, counting, tmp_path / "whole"))
    moments = [int(counting.calls * share) for share in (0.1, 0.3, 0.3, 0.25)]

    for allowed in moments:
        requests = iter(range(allowed))

        def fault(_: Sequence[str], requests: Iterator[int] = requests) -> None:
            if next(requests, None) is None:
                raise InterruptedByTest

        with pytest.raises(InterruptedByTest):
            crossval(config, FakeScorer(fault), tmp_path / "cut")
    assert (tmp_path / "cut" / "final").exists()
    assert results(crossval(config, path=tmp_path / "cut")) == whole


def test_experiment_with_other_settings_is_not_resumed(config: TrainerConfig) -> None:
    """The message names the setting that differs, with both values."""
    Experiment.open(config)
    other = with_values(config, {"update.learning_rate": 1e-3})
    with pytest.raises(
        ConfigError, match=r"trainer\.update\.learning_rate: 0\.001, but .* began with 0\.005"
    ):
        Experiment.open(other)
    Experiment.open(with_values(config, {"crossval.workers": 2, "service.url": "http://127.0.0.1:1"}))
    for longer in ({"iterations": 6}, {"evaluation.every": 1}):  # free in a run, but folds would differ
        with pytest.raises(ConfigError, match=next(iter(longer))):
            Experiment.open(with_values(config, longer))


@pytest.mark.slow
def test_folds_with_other_settings_are_refused(config: TrainerConfig) -> None:
    """Folds trained with the settings of a search's winner do not count for an experiment without them."""
    winner = with_values(config, {"update.learning_rate": 1e-3})  # with the winner's setting

    def fault(prompts: Sequence[str]) -> None:
        if set(prompts) & set(TEST):
            raise KeyboardInterrupt

    experiment = Experiment.open(config)
    with pytest.raises(KeyboardInterrupt):
        cross_validate(experiment, winner, FakeScorer(fault), Console(quiet=True), ())
    (experiment.path / "final" / "config.yaml").unlink()  # as if killed before the final fit began
    scorer = RecordingScorer()
    with pytest.raises(ConfigError, match=r"learning_rate: 0\.005, but .*folds/0 began with 0\.001"):
        crossval(config, scorer)
    assert scorer.requests == []


@pytest.mark.slow
def test_splits_edited_after_training_are_refused(config: TrainerConfig) -> None:
    """Training prompts of fold 0 cannot become its validation prompts, and no fold can be added."""
    path = crossval(config)
    text = (path / "splits.json").read_text()
    edited = json.loads(text)
    first, second = edited["folds"][0], edited["folds"][1]
    first[0], second[0] = second[0], first[0]
    (path / "splits.json").write_text(json.dumps(edited))
    with pytest.raises(ConfigError, match=r"folds/0: began with other prompts .* splits\.json"):
        crossval(config)
    edited["folds"].append([edited["folds"][0].pop()])
    (path / "splits.json").write_text(json.dumps(edited))
    with pytest.raises(ConfigError, match=r"splits\.json: has 4 folds for crossval\.folds=3"):
        crossval(config)


# ------------------------------------------------------------------------------------ early stopping


class OverfittingScorer(FakeScorer):
    """Scores of held-out prompts are highest at a redness of `peak`; those of other prompts rise with red."""

    def __init__(self, held_out: Sequence[str], peak: float) -> None:
        super().__init__()
        self._held_out, self._peak = frozenset(held_out), peak

    def score(self, prompts: Sequence[str], images: Images) -> Scores:
        scores = super().score(prompts, images)
        held_out = np.array([prompt in self._held_out for prompt in prompts])
        red = scores.raw[:, 1]
        raw = scores.raw.copy()
        raw[:, 1] = np.where(held_out, -abs(red - self._peak), red)
        return Scores(raw, 10 * raw)


@pytest.mark.slow
def test_overfitting_fold_stops_within_patience_and_saves_its_best(
    config: TrainerConfig, fitted_karlo_folder: Path, tmp_path: Path
) -> None:
    """The LoRA and the evaluation are those of the checkpoint at the peak, not of the last one."""
    patient = learnable(
        config,
        fitted_karlo_folder,
        {"evaluation.every": 1, "early_stopping.patience": 3, "early_stopping.min_delta": 0},
    )
    scorer = OverfittingScorer(TEST, peak=-0.1)
    run = RunFolder.create(patient, tmp_path / "run")
    split = Split(POOL, TEST, tuple(range(len(TEST))))
    result = train_run(patient, split, scorer, run, Console(quiet=True))
    curve = [
        json.loads(line)["evaluation"]["composite"]["after"]
        for line in (run.path / "metrics.jsonl").read_text().splitlines()
    ]
    peak = int(np.argmax(curve)) + 1
    assert result.ending is not None
    assert result.ending.by == "patience"
    assert peak < result.reached < 15
    assert result.reached - peak <= 3
    assert result.done == peak
    assert result.evaluation.comparison.composite.after == pytest.approx(curve[peak - 1], abs=1e-9)
    best, _ = decode(read_stored(run.checkpoints / f"iteration-{peak:06d}"))
    saved = load_file(run.lora / LORA_FILE)
    averages = [tensor for name, tensor in best.tensors.items() if name.startswith("average/")]
    assert sorted(float(t.double().sum()) for t in saved.values()) == pytest.approx(
        sorted(float(t.double().sum()) for t in averages)
    )


# -------------------------------------------------------------------------------------------- guard


@pytest.mark.slow
def test_guard_that_falls_while_the_composite_rises_ends_the_run(
    config: TrainerConfig, fitted_karlo_folder: Path, tmp_path: Path
) -> None:
    """The guard "dark" is the opposite of "red", which is trained on: there is no final fit."""

    class OpposedScorer(FakeScorer):
        def score(self, prompts: Sequence[str], images: Images) -> Scores:
            red = super().score(prompts, images).raw[:, 1]
            raw = np.stack([-red, red], axis=1)
            return Scores(raw, 10 * raw)

    guarded = learnable(config, fitted_karlo_folder, {"guard.evaluator": "dark"})
    with pytest.raises(GuardError, match="guard tripped in fold 0"):
        crossval(guarded, OpposedScorer(), tmp_path / "hacked")
    rows = json.loads((tmp_path / "hacked" / "crossval.json").read_text())["folds"]
    assert all(row["stopped"]["by"] == "guard" and row["iterations"] < 15 for row in rows)
    assert not (tmp_path / "hacked" / "test.json").exists()
    with pytest.raises(GuardError):  # running it again does not continue it
        crossval(guarded, OpposedScorer(), tmp_path / "hacked")


@pytest.mark.slow
def test_guard_that_rises_with_the_composite_does_not_trip(
    config: TrainerConfig, fitted_karlo_folder: Path, tmp_path: Path
) -> None:
    """An evaluator that agrees with the rewards is no sign of reward hacking."""

    class AgreeingScorer(FakeScorer):
        def score(self, prompts: Sequence[str], images: Images) -> Scores:
            red = super().score(prompts, images).raw[:, 1]
            raw = np.stack([red, red], axis=1)
            return Scores(raw, 10 * raw)

    guarded = learnable(config, fitted_karlo_folder, {"guard.evaluator": "dark", "iterations": 5})
    path = crossval(guarded, AgreeingScorer(), tmp_path / "honest")
    assert not any(fold["guard"]["tripped"] for fold in results(path)["crossval.json"]["folds"])
    assert results(path)["test.json"]["guard"]["tripped"] is False
