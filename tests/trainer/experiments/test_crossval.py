"""Cross-validation on the tiny Karlo: folds, early stopping, the guard, the one look at the test."""

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
    """Three folds of two evaluations each; a run takes seconds."""
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


def learning(config: TrainerConfig, karlo: Path, changes: Mapping[str, Any]) -> TrainerConfig:
    """The same with a Karlo and settings with which something is learned."""
    planted = {key.replace("__", "."): value for key, value in LEARNABLE.items()}
    more = {"karlo.path": str(karlo), "crossval.folds": 2, "checkpoints.keep": 100}
    more |= {"iterations": 15, "evaluation.every": 5, "evaluation.images_per_prompt": 4}
    more |= {"early_stopping.patience": 0, "sampling.decoder_steps": SAMPLING.decoder_steps}
    return with_values(config, planted | more | dict(changes))


def crossval(config: TrainerConfig, scorer: FakeScorer | None = None, path: Path | None = None) -> Path:
    """Begin the experiment, or go on with it; returns its folder."""
    experiment = Experiment.open(config, path)
    cross_validate(experiment, config, scorer or FakeScorer(), Console(quiet=True), ())
    return experiment.path


def outcome(path: Path) -> dict[str, Any]:
    """Everything that is reported."""
    return {name: json.loads((path / name).read_text()) for name in ("crossval.json", "test.json")}


class Listening(FakeScorer):
    """Writes down which prompts it was asked about."""

    def __init__(self, fault: Callable[[Sequence[str]], None] = len) -> None:  # type: ignore[assignment]
        super().__init__(fault)
        self.asked: list[frozenset[str]] = []

    def score(self, prompts: Sequence[str], images: Images) -> Scores:
        self.asked.append(frozenset(prompts))
        return super().score(prompts, images)


def test_every_prompt_is_validated_once_and_the_test_is_seen_last(config: TrainerConfig) -> None:
    """No score of a test prompt is asked for before all folds are done."""
    scorer = Listening()
    path = crossval(config, scorer)
    folds, test = outcome(path)["crossval.json"], outcome(path)["test.json"]
    assert sum(fold["prompts"] for fold in folds["folds"]) == len(POOL) == folds["pooled"]["prompts"]
    assert test["prompts"] == len(TEST)
    seen = [bool(asked & set(TEST)) for asked in scorer.asked]
    assert not any(seen[: seen.index(True)])
    before_test = set().union(*scorer.asked[: seen.index(True)])
    assert before_test == set(POOL)
    kept = json.loads((path / "final" / "prompts.json").read_text())
    assert set(kept["train"]) == set(POOL)
    assert set(kept["validation"]) == set(TEST)
    finished = json.loads((path / "final" / "finished.json").read_text())
    assert finished["done"] == finished["reached"] == folds["chosen_iterations"]


def test_a_finished_experiment_is_not_done_again(config: TrainerConfig) -> None:
    """The same command asks for no score then."""
    first = outcome(crossval(config))
    scorer = Listening()
    assert outcome(crossval(config, scorer)) == first
    assert scorer.asked == []


def test_what_is_deleted_of_a_fold_is_made_again(config: TrainerConfig) -> None:
    """As the message about a damaged file advises; from the checkpoints, with the same numbers."""
    path = crossval(config)
    first = outcome(path)
    for name in ("tuned.npz", "evaluation.json"):
        (path / "folds" / "1" / name).unlink()
        assert outcome(crossval(config)) == first


def test_an_interrupted_experiment_ends_with_the_same_numbers(config: TrainerConfig, tmp_path: Path) -> None:
    """However often it was ended: in the first fold, in a later one, and in the final fit."""

    class EndedError(BaseException):
        pass

    counting = FakeScorer()
    whole = outcome(crossval(config, counting, tmp_path / "whole"))
    moments = [int(counting.calls * share) for share in (0.1, 0.3, 0.3, 0.25)]

    for left in moments:
        asked = iter(range(left))

        def fault(_: Sequence[str], asked: Iterator[int] = asked) -> None:
            if next(asked, None) is None:
                raise EndedError

        with pytest.raises(EndedError):
            crossval(config, FakeScorer(fault), tmp_path / "cut")
    assert (tmp_path / "cut" / "final").exists()
    assert outcome(crossval(config, path=tmp_path / "cut")) == whole


def test_an_experiment_of_other_settings_is_not_gone_on_with(config: TrainerConfig) -> None:
    """The one setting that differs is named, with both values."""
    Experiment.open(config)
    other = with_values(config, {"update.learning_rate": 1e-3})
    with pytest.raises(
        ConfigError, match=r"trainer\.update\.learning_rate: 0\.001, but .* began with 0\.005"
    ):
        Experiment.open(other)
    Experiment.open(with_values(config, {"crossval.workers": 2, "service.url": "http://127.0.0.1:1"}))
    for longer in ({"iterations": 6}, {"evaluation.every": 1}):  # a run may; folds would be of two kinds
        with pytest.raises(ConfigError, match=next(iter(longer))):
            Experiment.open(with_values(config, longer))


def test_folds_of_other_settings_are_not_fitted_on(config: TrainerConfig) -> None:
    """With and without a search's winner are two things: where folds have the one, the other is refused."""
    cut = with_values(config, {"update.learning_rate": 1e-3})  # as a search's winner has it

    def fault(prompts: Sequence[str]) -> None:
        if set(prompts) & set(TEST):
            raise KeyboardInterrupt

    experiment = Experiment.open(config)
    with pytest.raises(KeyboardInterrupt):
        cross_validate(experiment, cut, FakeScorer(fault), Console(quiet=True), ())
    (experiment.path / "final" / "config.yaml").unlink()  # as if killed before the final fit began
    scorer = Listening()
    with pytest.raises(ConfigError, match=r"learning_rate: 0\.005, but .*folds/0 began with 0\.001"):
        crossval(config, scorer)
    assert scorer.asked == []


def test_splits_edited_after_a_fold_are_refused(config: TrainerConfig) -> None:
    """What fold 0 has trained on cannot become what it is validated on, nor a fold come or go."""
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


class Overfitting(FakeScorer):
    """Training prompts like red without end; the others like a little of it, and ever less what is beyond."""

    def __init__(self, held_out: Sequence[str], most: float) -> None:
        super().__init__()
        self._held_out, self._most = frozenset(held_out), most

    def score(self, prompts: Sequence[str], images: Images) -> Scores:
        scores = super().score(prompts, images)
        held_out = np.array([prompt in self._held_out for prompt in prompts])
        red = scores.raw[:, 1]
        raw = scores.raw.copy()
        raw[:, 1] = np.where(held_out, -abs(red - self._most), red)
        return Scores(raw, 10 * raw)


@pytest.mark.slow
def test_a_fold_that_overfits_stops_within_patience_and_ships_its_best(
    config: TrainerConfig, fitted_karlo_folder: Path, tmp_path: Path
) -> None:
    """Not its last: the LoRA and the evaluation are those of the checkpoint at the peak."""
    patient = learning(
        config,
        fitted_karlo_folder,
        {"evaluation.every": 1, "early_stopping.patience": 3, "early_stopping.min_delta": 0},
    )
    scorer = Overfitting(TEST, most=-0.1)
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
    shipped = load_file(run.lora / LORA_FILE)
    averages = [tensor for name, tensor in best.tensors.items() if name.startswith("average/")]
    assert sorted(float(t.double().sum()) for t in shipped.values()) == pytest.approx(
        sorted(float(t.double().sum()) for t in averages)
    )


# -------------------------------------------------------------------------------------------- guard


@pytest.mark.slow
def test_a_guard_that_falls_while_the_composite_rises_ends_the_run(
    config: TrainerConfig, fitted_karlo_folder: Path, tmp_path: Path
) -> None:
    """Red images are not dark: trained on red alone, with "dark" on guard, no final fit comes of it."""

    class Opposed(FakeScorer):
        def score(self, prompts: Sequence[str], images: Images) -> Scores:
            red = super().score(prompts, images).raw[:, 1]
            raw = np.stack([-red, red], axis=1)
            return Scores(raw, 10 * raw)

    guarded = learning(config, fitted_karlo_folder, {"guard.evaluator": "dark"})
    with pytest.raises(GuardError, match="guard tripped in fold 0"):
        crossval(guarded, Opposed(), tmp_path / "hacked")
    rows = json.loads((tmp_path / "hacked" / "crossval.json").read_text())["folds"]
    assert all(row["stopped"]["by"] == "guard" and row["iterations"] < 15 for row in rows)
    assert not (tmp_path / "hacked" / "test.json").exists()
    with pytest.raises(GuardError):  # nor does it go on when asked again
        crossval(guarded, Opposed(), tmp_path / "hacked")


@pytest.mark.slow
def test_an_honest_run_does_not_trip_its_guard(
    config: TrainerConfig, fitted_karlo_folder: Path, tmp_path: Path
) -> None:
    """An evaluator that rises with what is trained on guards in peace."""

    class Allied(FakeScorer):
        def score(self, prompts: Sequence[str], images: Images) -> Scores:
            red = super().score(prompts, images).raw[:, 1]
            raw = np.stack([red, red], axis=1)
            return Scores(raw, 10 * raw)

    guarded = learning(config, fitted_karlo_folder, {"guard.evaluator": "dark", "iterations": 5})
    path = crossval(guarded, Allied(), tmp_path / "honest")
    assert not any(fold["guard"]["tripped"] for fold in outcome(path)["crossval.json"]["folds"])
    assert outcome(path)["test.json"]["guard"]["tripped"] is False
