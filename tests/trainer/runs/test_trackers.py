"""Metric loggers: metrics.jsonl, TensorBoard and Weights & Biases, and progress bars."""

import io
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reward_service.runtime import progress as progress_module
from reward_service.runtime.progress import progress, track
from tests.trainer.conftest import PROMPTS, FakeScorer
from tests.trainer.rl.test_train import with_changes
from trainer.config import ConfigError, TrainerConfig
from trainer.data.splits import Split
from trainer.rl.rewards import ScoringError
from trainer.runs import trackers
from trainer.runs.folder import RunFolder
from trainer.runs.trackers import RunLogger, flat_numbers
from trainer.runs.train import train_run
from trainer.runtime.errors import EvaluationError

IMAGE = Image.fromarray(np.full((6, 9, 3), 128, np.uint8))


def events(run: RunFolder) -> EventAccumulator:
    accumulator = EventAccumulator(str(run.path / "tensorboard"))
    accumulator.Reload()
    return accumulator


def logged_run(config: TrainerConfig, iterations: int = 4, **changes: Any) -> RunFolder:
    """Run a whole training with its logs."""
    config = with_changes(config, iterations=iterations, evaluation__images_per_prompt=2, **changes)
    run = RunFolder.create(config)
    train_run(config, Split(PROMPTS, ("held out", "other", "third"), (0, 1, 2)), FakeScorer(), run, _silent())
    run.close()
    return run


def _silent() -> Any:
    from rich.console import Console

    return Console(file=io.StringIO())


def test_flat_numbers_joins_nested_names() -> None:
    """Strings, nulls and booleans are not curves."""
    record = {"a": 1, "b": {"c": 2.5, "d": {"e": 3}}, "verdict": "rises", "low": None, "flag": True}
    assert dict(flat_numbers(record)) == {"a": 1.0, "b/c": 2.5, "b/d/e": 3.0}


def test_run_logs_its_evaluations(trainer_config: TrainerConfig) -> None:
    """Every second record has an evaluation, TensorBoard its curves, the run folder its grid."""
    run = logged_run(trainer_config, evaluation__every=2)
    records = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert ["evaluation" in record for record in records] == [False, True, False, True]
    grids = sorted(path.name for path in (run.path / "grids").iterdir())
    assert grids == ["iteration-000002.png", "iteration-000004.png"]
    found = events(run)
    composite = [(event.step, event.value) for event in found.Scalars("training/composite")]
    assert composite == [(r["iteration"] + 1, pytest.approx(r["composite"])) for r in records]
    low = found.Scalars("evaluation/composite/low")
    assert [event.step for event in low] == [2, 4]
    assert low[0].value == pytest.approx(records[1]["evaluation"]["composite"]["low"])
    assert [event.step for event in found.Images("grids")] == [2, 4]
    for record in records:
        assert 0 <= record["exposed_wait_share"] < 1
        assert record["exposed_wait_s"] + record["hidden_wait_s"] == pytest.approx(record["score_s"])


def test_last_evaluation_of_training_is_the_final_one(trainer_config: TrainerConfig) -> None:
    """The moving average is evaluated during training as at the end, and not measured twice."""
    run = logged_run(trainer_config, iterations=2, evaluation__every=2)
    record = json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1])
    final = json.loads((run.path / "evaluation.json").read_text())
    assert {**record["evaluation"], "seconds": 0} == {**final["rows"], "seconds": 0}
    assert final["rows"]["red"]["difference"] != 0
    best = json.loads((run.path / "checkpoints" / "best.json").read_text())
    assert best == {"iteration": 2, "composite": final["rows"]["composite"]["after"]}


def test_evaluations_during_training_may_take_fewer_prompts(trainer_config: TrainerConfig) -> None:
    """They compare with the base on the same prompts; the final one takes all."""
    run = logged_run(trainer_config, iterations=2, evaluation__every=2, evaluation__every_limit=2)
    record = json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1])
    final = json.loads((run.path / "evaluation.json").read_text())
    assert final["prompts"] == 3
    assert record["evaluation"]["red"]["before"] != final["rows"]["red"]["before"]


def test_failed_evaluation_ends_the_run_with_a_checkpoint(trainer_config: TrainerConfig) -> None:
    """The checkpoint of the iteration before is there to resume from."""
    config = with_changes(trainer_config, iterations=2, evaluation__every=2)
    run = RunFolder.create(config)
    remaining = [3]  # the base's request, and those of two iterations

    def fault(_: object) -> None:
        remaining[0] -= 1
        if remaining[0] < 0:
            raise ScoringError("gone", retryable=False)

    with pytest.raises(EvaluationError, match="gone"):
        train_run(config, Split(PROMPTS, ("held out",), (0,)), FakeScorer(fault), run, _silent())
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["iteration-000001"]


def test_tensorboard_discards_lost_iterations_after_a_resume(trainer_config: TrainerConfig) -> None:
    """The events of two processes make one curve, without a step that is logged twice."""
    run = RunFolder.create(trainer_config)
    for done, values in ((0, (1.0, 2.0, 3.0)), (1, (20.0, 30.0))):
        with RunLogger.open(trainer_config, run, done) as logger:
            for step, value in enumerate(values, done + 1):
                logger.log_scalars({"x": value}, step)
    assert [(e.step, e.value) for e in events(run).Scalars("x")] == [(1, 1.0), (2, 20.0), (3, 30.0)]


def test_tensorboard_can_be_disabled(trainer_config: TrainerConfig) -> None:
    """metrics.jsonl and the grids are always written."""
    config = with_changes(trainer_config, logging__tensorboard=False)
    run = RunFolder.create(config)
    with RunLogger.open(config, run, 0) as logger:
        logger.log_iteration({"iteration": 0, "composite": 0.5})
        logger.log_grid(IMAGE, 1)
    assert json.loads((run.path / "metrics.jsonl").read_text()) == {"iteration": 0, "composite": 0.5}
    assert (run.path / "grids" / "iteration-000001.png").exists()
    assert not (run.path / "tensorboard").exists()


class FakeWandb(ModuleType):
    """Keeps what is logged."""

    class Error(Exception):
        """As the real one's."""

    Image = staticmethod(lambda image: ("image", image.size))

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.finished = 0

    def init(self, **options: Any) -> Any:
        self.started.append(options)
        return SimpleNamespace(
            log=self.logged.append, define_metric=lambda *_, **__: None, finish=self._finish
        )

    def _finish(self) -> None:
        self.finished += 1


def test_weights_and_biases_logs_the_same(
    trainer_config: TrainerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also offline; a resumed run is the same run there, and its steps may decrease."""
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = with_changes(trainer_config, logging__wandb=True, logging__wandb_mode="offline")
    run = RunFolder.create(config)
    for done in (0, 1):
        with RunLogger.open(config, run, done) as logger:
            logger.log_iteration({"iteration": done, "z": {"red": 0.5}})
            logger.log_grid(IMAGE, done + 1)
    assert fake.finished == 2
    first, second = fake.started
    assert first["mode"] == "offline"
    assert first["id"] == second["id"]
    assert Path(first["dir"]) == run.path
    assert first["config"]["objective"]["weights"] == {"red": 1.0}
    assert {"training/iteration": 0.0, "training/z/red": 0.5, "step": 1} in fake.logged
    assert {"grids": ("image", (9, 6)), "step": 2} in fake.logged


@pytest.mark.parametrize("broken", ["missing", "fails"])
def test_missing_weights_and_biases_is_a_one_line_error(
    broken: str, trainer_config: TrainerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not installed, or not logged in: the field, the cause and the remedy."""
    fake = FakeWandb()

    def fail(**_: Any) -> None:
        raise fake.Error("api_key not configured")

    fake.init = fail  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "wandb", None if broken == "missing" else fake)
    config = with_changes(trainer_config, logging__wandb=True)
    with pytest.raises(ConfigError, match=r"trainer\.logging\.wandb: .*(pip install|offline)"):
        RunLogger.open(config, RunFolder.create(config), 0)


def test_full_disk_error_names_the_tensorboard_folder(
    trainer_config: TrainerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of TensorBoard itself does not name the file."""
    run = RunFolder.create(trainer_config)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space remaining on device")

    monkeypatch.setattr(trackers.SummaryWriter, "add_scalar", full)
    with RunLogger.open(trainer_config, run, 0) as logger, pytest.raises(OSError, match="No space") as caught:
        logger.log_scalars({"x": 1.0}, 1)
    assert caught.value.filename == str(run.path / "tensorboard")


def test_progress_prints_lines_without_a_terminal(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log gets whole lines, now and then, that do not overwrite each other."""
    monkeypatch.setattr(progress_module, "LOG_EVERY_S", 0.0)
    with progress(3, "training", "iteration", done=1) as bar:
        bar.set_postfix_str("composite +0.10", refresh=False)
        bar.update(2)
    output = capfd.readouterr().err
    assert "\r" not in output
    assert output.endswith("\n")
    assert "training: 3 of 3 iterations" in output
    assert "composite +0.10" in output
    monkeypatch.undo()
    assert list(track("abc", "update", "batch")) == ["a", "b", "c"]
    assert capfd.readouterr().err == ""  # over before the first half minute
