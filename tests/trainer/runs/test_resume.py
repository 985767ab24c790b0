"""Resuming: a run that is interrupted and resumed equals the uninterrupted run, bit for bit."""

import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import pytest

from tests.support.trainer.resumable import comparable_content, metrics, newest_tensors, short_config, train
from tests.trainer.conftest import FakeScorer
from trainer.cli.main import Stop
from trainer.config import ConfigError, TrainerConfig
from trainer.runs.folder import RunFolder, is_finished, newest_run, resumed_config
from trainer.runtime.errors import StorageError

REPOSITORY = Path(__file__).parents[3]
KILL_TEST_TIMEOUT_S = 1800  # about one minute on an idle machine


class InterruptingScorer(FakeScorer):
    """Scorer that raises the exception of a SIGTERM in request number `requests`, counted from 0."""

    def __init__(self, requests: int) -> None:
        super().__init__()
        self._requests = requests

    def score(self, prompts: Sequence[str], images):
        if self.calls == self._requests:
            raise Stop(15)
        return super().score(prompts, images)


@pytest.fixture
def config(tmp_path: Path, karlo_folder: Path) -> TrainerConfig:
    return short_config(tmp_path, karlo_folder)


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, karlo_folder: Path
) -> tuple[Path, dict[str, object]]:
    """Return the folder of a run of four iterations, and its comparable content."""
    config = short_config(tmp_path_factory.mktemp("whole"), karlo_folder)
    run = RunFolder.create(config)
    train(config, run)
    return run.path, comparable_content(run.path)


def interrupt(config: TrainerConfig, requests: int) -> Path:
    """Begin a run that is stopped in request number `requests`; return its folder."""
    run = RunFolder.create(config)
    with pytest.raises(Stop):
        train(config, run, InterruptingScorer(requests))
    run.close()
    return run.path


def resume(path: Path, config: TrainerConfig, scorer: FakeScorer | None = None) -> RunFolder:
    """Resume the run and train it to its end."""
    run = RunFolder.resume(path)
    try:
        train(config, run, scorer)
    finally:
        run.close()
    return run


# Scoring requests before each stage: the base's evaluation, four iterations, evaluations after two and four.
BASE, FIRST, SECOND, _, THIRD, FOURTH, _, LAST = accumulate((0, 2, 2, 2, 1, 2, 2, 1))
ALL = LAST + 2


@pytest.mark.parametrize("requests", [BASE, FIRST, FIRST + 1, THIRD - 1, THIRD, FOURTH + 1, LAST - 1, LAST])
def test_resumed_run_equals_the_uninterrupted_one(
    requests: int, config: TrainerConfig, uninterrupted: tuple[Path, dict[str, object]]
) -> None:
    """Adapter, average, optimizer, deviations, metrics, evaluation and images: bitwise equal."""
    path = interrupt(config, requests)
    resume(path, config)
    assert comparable_content(path) == uninterrupted[1]


@pytest.mark.slow
def test_finished_run_can_be_extended(tmp_path: Path, karlo_folder: Path) -> None:
    """Two iterations and two more equal four."""
    four = short_config(tmp_path, karlo_folder, update={"micro_batch": 4})
    whole = RunFolder.create(four)
    train(four, whole)
    two = RunFolder.create(four.model_copy(update={"iterations": 2}))
    train(four.model_copy(update={"iterations": 2}), two)
    assert is_finished(two, 2)
    resumed = resumed_config(two.path, None, ["iterations=4"])
    assert not is_finished(two, resumed.iterations)
    train(resumed, two)
    assert comparable_content(two.path)["tensors"] == comparable_content(whole.path)["tensors"]
    assert metrics(two.path) == metrics(whole.path)
    assert (two.path / "evaluation.json").read_bytes() == (whole.path / "evaluation.json").read_bytes()


def test_resume_does_not_measure_the_base_again(config: TrainerConfig) -> None:
    """Only the remaining iterations and evaluations are scored."""
    path = interrupt(config, FIRST + 1)
    scorer = FakeScorer()
    resume(path, config, scorer)
    assert scorer.calls == ALL - FIRST


def test_stop_saves_the_newest_iteration(tmp_path: Path, karlo_folder: Path) -> None:
    """Also between two checkpoints: only the unfinished iteration is lost."""
    config = short_config(tmp_path, karlo_folder, checkpoints={"every": 100})
    path = interrupt(config, FOURTH + 1)
    assert max(p.name for p in (path / "checkpoints").glob("iteration-*")) == "iteration-000003"
    resume(path, config)
    assert len(metrics(path)) == 4


def test_kill_between_checkpoints_logs_no_iteration_twice(
    tmp_path: Path, karlo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines after the checkpoint, and an incomplete line, are cut off before they are written again."""
    config = short_config(tmp_path, karlo_folder, checkpoints={"every": 2})
    monkeypatch.setattr("trainer.runs.checkpoints.Checkpoints.flush", _flush_if_due)
    path = interrupt(config, FOURTH + 1)
    assert [record["iteration"] for record in metrics(path)] == [0, 1, 2]
    monkeypatch.undo()
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 3, "comp')
    resume(path, config)
    assert [record["iteration"] for record in metrics(path)] == [0, 1, 2, 3]


def _flush_if_due(checkpoints) -> None:
    """Save a checkpoint only if it is due, as if the process were killed."""
    if checkpoints.pending is not None and checkpoints.pending.done % checkpoints.config.every == 0:
        checkpoints.save(checkpoints.pending)
        checkpoints.pending = None


def test_resume_skips_a_damaged_checkpoint(
    config: TrainerConfig, uninterrupted: tuple[Path, dict[str, object]]
) -> None:
    """One flipped bit in the newest: the run resumes from the one before, to the same end."""
    path = interrupt(config, FOURTH)
    file = path / "checkpoints" / "iteration-000003" / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    resume(path, config)
    assert comparable_content(path) == uninterrupted[1]


@pytest.mark.parametrize("file", ["base.npz", "checkpoints/best.json"])
def test_resume_recreates_damaged_files(
    file: str, config: TrainerConfig, uninterrupted: tuple[Path, dict[str, object]]
) -> None:
    """A truncated base measurement is made again, and the best marked again: the end is the same."""
    path = interrupt(config, FOURTH)
    content = (path / file).read_bytes()
    (path / file).write_bytes(content[: len(content) // 2])
    resume(path, config)
    assert comparable_content(path) == uninterrupted[1]


# ------------------------------------------------------------------------------------------ refusals


def test_resume_refuses_a_run_without_a_complete_checkpoint(
    config: TrainerConfig,
) -> None:
    """The log stays, and the error names the remedies."""
    path = interrupt(config, FOURTH)
    for file in (path / "checkpoints").glob("*/tensors.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    logged = (path / "metrics.jsonl").read_bytes()
    with pytest.raises(StorageError, match=r"none of its \d checkpoints is complete; begin a new run"):
        resume(path, config)
    assert (path / "metrics.jsonl").read_bytes() == logged


def test_resumed_config_refuses_settings_that_change_the_result(config: TrainerConfig) -> None:
    """The error names the setting and both values; other settings may change."""
    run = RunFolder.create(config)
    for override, message in (
        ("update.learning_rate=0.5", r"trainer\.update\.learning_rate: 0\.5, but .* began with 0\.001"),
        ("seed=7", r"trainer\.seed: 7, but .* began with 0"),
        ("iterations=5", r"cosine update\.schedule depends on"),
        ("objective.weights={red: 1}", r"objective\.weights\.dark: nothing, but .* began with 0\.5"),
    ):
        with pytest.raises(ConfigError, match=message):
            resumed_config(run.path, None, [override])
    mutable = ["threads=2", "service.url=http://elsewhere", "checkpoints.keep=9", "sampling.micro_batch=2"]
    mutable += ["memory.offload=idle", "update.gradient_checkpointing=true"]  # after running out of memory
    resumed = resumed_config(run.path, None, mutable)
    assert (resumed.threads, resumed.service.url, resumed.checkpoints.keep) == (2, "http://elsewhere", 9)


def test_resume_notices_an_edited_configuration(config: TrainerConfig) -> None:
    """The checkpoint has the configuration that it was made with."""
    path = interrupt(config, THIRD)
    text = (path / "config.yaml").read_text()
    (path / "config.yaml").write_text(text.replace("weight_decay: 0.01", "weight_decay: 0.5"))
    edited = resumed_config(path, None, [])
    with pytest.raises(ConfigError, match=r"update\.weight_decay: 0\.5, but .* began with 0\.01"):
        resume(path, edited)


def test_resume_refuses_fewer_iterations_than_are_done(tmp_path: Path, karlo_folder: Path) -> None:
    """The error names the iterations that are done."""
    config = short_config(tmp_path, karlo_folder, update={"micro_batch": 4})
    path = interrupt(config, FOURTH)
    with pytest.raises(ConfigError, match=r"iterations: 2, but .* has already done 3"):
        resume(path, config.model_copy(update={"iterations": 2}))


def test_resume_refuses_another_scorer(config: TrainerConfig) -> None:
    """Scores of two services are not comparable: the error names the evaluator and the difference."""
    path = interrupt(config, FIRST)

    class Other(FakeScorer):
        identity = {"dark": "d/1", "red": "r/2"}  # noqa: RUF012

    with pytest.raises(StorageError, match=r"red's calibration is 2, was 1; .*begin a new run"):
        resume(path, config, Other())


def test_resume_keeps_the_prompts_of_the_beginning(config: TrainerConfig) -> None:
    """Editing a prompt file does not change a run that has begun."""
    from trainer.runs.folder import pinned_prompts

    path = interrupt(config, FIRST)
    before = pinned_prompts(RunFolder(path), config)
    config.prompts.train.write_text("something else")
    assert pinned_prompts(RunFolder(path), config) == before


# ------------------------------------------------------------------------------------------- folders


def test_run_folder_is_locked_for_a_second_trainer(config: TrainerConfig) -> None:
    """The error names the process that has it; after `close` it is free."""
    run = RunFolder.create(config)
    with pytest.raises(StorageError, match=r"another trainer \(process \d+\) is writing"):
        RunFolder.resume(run.path)
    run.close()
    RunFolder.resume(run.path)


def test_newest_run_is_the_last_begun_of_its_name(config: TrainerConfig) -> None:
    """Other names, and folders without a configuration, do not count."""
    with pytest.raises(ConfigError, match="no run named short"):
        newest_run(config)
    RunFolder.create(config)
    second = RunFolder.create(config)
    RunFolder.create(config.model_copy(update={"name": "short-er"}))
    (config.runs_dir / "short-9").mkdir()
    assert newest_run(config) == second.path


def test_resume_removes_incomplete_files(config: TrainerConfig) -> None:
    """Leftovers of a kill do not accumulate."""
    path = interrupt(config, SECOND)
    for folder in (path, path / "checkpoints"):
        (folder / ".writing-x").mkdir()
        (folder / ".removing-y").mkdir()
        (folder / ".z.json.partial").touch()
    resume(path, config)
    hidden = {p.name for p in path.rglob(".*")}
    assert hidden == {".lock"}
    assert newest_tensors(path)


def test_finished_run_is_marked(uninterrupted: tuple[Path, dict[str, object]]) -> None:
    """finished.json has the iterations, and all result files exist."""
    assert is_finished(RunFolder(uninterrupted[0]), 4)
    finished = json.loads((uninterrupted[0] / "finished.json").read_text())
    assert finished == {"iterations": 4, "reached": 4, "done": 4}


@pytest.mark.slow
@pytest.mark.timeout(KILL_TEST_TIMEOUT_S + 60)
def test_kills_at_random_moments_do_not_change_the_result(tmp_path: Path) -> None:
    """SIGKILL at six random moments, also during writes; `make kill-test` does it 25 times."""
    command = [
        sys.executable,
        "-m",
        "tests.support.trainer.kill_driver",
        str(tmp_path / "runs"),
        "--kills",
        "6",
    ]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=KILL_TEST_TIMEOUT_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 checkpoints were incomplete" in done.stdout
