"""What is told of a run while it goes on, and to whom."""

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

from tests.trainer.conftest import PROMPTS, FakeScorer
from tests.trainer.rl.test_train import with_changes
from trainer.config import ConfigError, TrainerConfig
from trainer.data.splits import Split
from trainer.rl.rewards import ScoringError
from trainer.runs import trackers as journal_module
from trainer.runs.folder import RunFolder
from trainer.runs.trackers import Journal, flat_numbers
from trainer.runs.train import train_run
from trainer.runtime import progress as progress_module
from trainer.runtime.errors import EvaluationError
from trainer.runtime.progress import progress, track

IMAGE = Image.fromarray(np.full((6, 9, 3), 128, np.uint8))


def events(run: RunFolder) -> EventAccumulator:
    accumulator = EventAccumulator(str(run.path / "tensorboard"))
    accumulator.Reload()
    return accumulator


def told(config: TrainerConfig, iterations: int = 4, **changes: Any) -> RunFolder:
    """A whole run, with what it tells."""
    config = with_changes(config, iterations=iterations, evaluation__images_per_prompt=2, **changes)
    run = RunFolder.create(config)
    train_run(config, Split(PROMPTS, ("held out", "other", "third"), (0, 1, 2)), FakeScorer(), run, _silent())
    run.close()
    return run


def _silent() -> Any:
    from rich.console import Console

    return Console(file=io.StringIO())


def test_numbers_of_nested_records_get_joined_names() -> None:
    """Words, nulls and truth values are no curves."""
    record = {"a": 1, "b": {"c": 2.5, "d": {"e": 3}}, "verdict": "rises", "low": None, "flag": True}
    assert dict(flat_numbers(record)) == {"a": 1.0, "b/c": 2.5, "b/d/e": 3.0}


def test_a_run_is_told_with_its_evaluations_in_between(trainer_config: TrainerConfig) -> None:
    """Every second iteration's record has an evaluation, TensorBoard its curves, the run folder its grid."""
    run = told(trainer_config, evaluation__every=2)
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


def test_the_last_evaluation_in_between_is_the_final_one(trainer_config: TrainerConfig) -> None:
    """The average is what is evaluated, in between as in the end; and it is not measured twice."""
    run = told(trainer_config, iterations=2, evaluation__every=2)
    record = json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1])
    final = json.loads((run.path / "evaluation.json").read_text())
    assert {**record["evaluation"], "seconds": 0} == {**final["rows"], "seconds": 0}
    assert final["rows"]["red"]["difference"] != 0
    best = json.loads((run.path / "checkpoints" / "best.json").read_text())
    assert best == {"iteration": 2, "composite": final["rows"]["composite"]["after"]}


def test_evaluations_in_between_may_take_fewer_prompts(trainer_config: TrainerConfig) -> None:
    """They compare with the base on the same prompts; the final one takes all."""
    run = told(trainer_config, iterations=2, evaluation__every=2, evaluation__every_limit=2)
    record = json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1])
    final = json.loads((run.path / "evaluation.json").read_text())
    assert final["prompts"] == 3
    assert record["evaluation"]["red"]["before"] != final["rows"]["red"]["before"]


def test_a_failed_evaluation_ends_the_run_and_keeps_what_was_learned(trainer_config: TrainerConfig) -> None:
    """The checkpoint of the iteration before is there to go on from."""
    config = with_changes(trainer_config, iterations=2, evaluation__every=2)
    run = RunFolder.create(config)
    left = [3]  # the base's request, and those of two iterations

    def fault(_: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise ScoringError("gone", retryable=False)

    with pytest.raises(EvaluationError, match="gone"):
        train_run(config, Split(PROMPTS, ("held out",), (0,)), FakeScorer(fault), run, _silent())
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["iteration-000001"]


def test_what_a_lost_iteration_said_is_void_after_a_resume(trainer_config: TrainerConfig) -> None:
    """Two processes' events make one curve without a step that was told twice."""
    run = RunFolder.create(trainer_config)
    for done, values in ((0, (1.0, 2.0, 3.0)), (1, (20.0, 30.0))):
        with Journal.open(trainer_config, run, done) as journal:
            for step, value in enumerate(values, done + 1):
                journal.scalars({"x": value}, step)
    assert [(e.step, e.value) for e in events(run).Scalars("x")] == [(1, 1.0), (2, 20.0), (3, 30.0)]


def test_tensorboard_can_be_left_out(trainer_config: TrainerConfig) -> None:
    """metrics.jsonl and the grids are always there."""
    config = with_changes(trainer_config, logging__tensorboard=False)
    run = RunFolder.create(config)
    with Journal.open(config, run, 0) as journal:
        journal.record({"iteration": 0, "composite": 0.5})
        journal.grid(IMAGE, 1)
    assert json.loads((run.path / "metrics.jsonl").read_text()) == {"iteration": 0, "composite": 0.5}
    assert (run.path / "grids" / "iteration-000001.png").exists()
    assert not (run.path / "tensorboard").exists()


class FakeWandb(ModuleType):
    """Remembers what it was told."""

    class Error(Exception):
        """As the real one's."""

    Image = staticmethod(lambda image: ("picture", image.size))

    def __init__(self) -> None:
        super().__init__("wandb")
        self.began: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.finished = 0

    def init(self, **options: Any) -> Any:
        self.began.append(options)
        return SimpleNamespace(
            log=self.logged.append, define_metric=lambda *_, **__: None, finish=self._finish
        )

    def _finish(self) -> None:
        self.finished += 1


def test_weights_and_biases_hears_the_same_where_it_is_asked_for(
    trainer_config: TrainerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline as well; a run that goes on is the same run there, and its steps may go back."""
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = with_changes(trainer_config, logging__wandb=True, logging__wandb_mode="offline")
    run = RunFolder.create(config)
    for done in (0, 1):
        with Journal.open(config, run, done) as journal:
            journal.record({"iteration": done, "z": {"red": 0.5}})
            journal.grid(IMAGE, done + 1)
    assert fake.finished == 2
    first, second = fake.began
    assert first["mode"] == "offline"
    assert first["id"] == second["id"]
    assert Path(first["dir"]) == run.path
    assert first["config"]["objective"]["weights"] == {"red": 1.0}
    assert {"training/iteration": 0.0, "training/z/red": 0.5, "step": 1} in fake.logged
    assert {"grids": ("picture", (9, 6)), "step": 2} in fake.logged


@pytest.mark.parametrize("broken", ["missing", "refuses"])
def test_without_weights_and_biases_the_wish_for_it_is_one_line(
    broken: str, trainer_config: TrainerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not installed, or not logged in: the field, the cause and the remedy."""
    fake = FakeWandb()

    def refuse(**_: Any) -> None:
        raise fake.Error("api_key not configured")

    fake.init = refuse  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "wandb", None if broken == "missing" else fake)
    config = with_changes(trainer_config, logging__wandb=True)
    with pytest.raises(ConfigError, match=r"trainer\.logging\.wandb: .*(pip install|offline)"):
        Journal.open(config, RunFolder.create(config), 0)


def test_a_full_disk_is_named(trainer_config: TrainerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard's own error would not say which file it could not write."""
    run = RunFolder.create(trainer_config)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal_module.SummaryWriter, "add_scalar", full)
    with Journal.open(trainer_config, run, 0) as journal, pytest.raises(OSError, match="No space") as caught:
        journal.scalars({"x": 1.0}, 1)
    assert caught.value.filename == str(run.path / "tensorboard")


def test_bars_are_lines_where_there_is_no_terminal(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log gets whole lines, now and then, and nothing that rewrites itself."""
    monkeypatch.setattr(progress_module, "LOG_EVERY_S", 0.0)
    with progress(3, "training", "iteration", done=1) as bar:
        bar.set_postfix_str("composite +0.10", refresh=False)
        bar.update(2)
    said = capfd.readouterr().err
    assert "\r" not in said
    assert said.endswith("\n")
    assert "training: 3 of 3 iterations" in said
    assert "composite +0.10" in said
    monkeypatch.undo()
    assert list(track("abc", "update", "batch")) == ["a", "b", "c"]
    assert capfd.readouterr().err == ""  # over before the first half minute
