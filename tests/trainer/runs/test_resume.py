"""A run that is ended and goes on is the run that was never ended, bit for bit."""

import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import pytest

from tests.support.trainer.resumable import essence, metrics, newest, short_config, train
from tests.trainer.conftest import FakeScorer
from trainer.cli.main import Stop
from trainer.config import ConfigError, TrainerConfig
from trainer.runs.folder import RunFolder, is_finished, newest_run, resumed_config
from trainer.runtime.errors import StorageError

REPOSITORY = Path(__file__).parents[3]


class Interrupted(FakeScorer):
    """A reward service in the middle of whose n-th answer the program is asked to leave."""

    def __init__(self, answers: int) -> None:
        super().__init__()
        self._answers = answers

    def score(self, prompts: Sequence[str], images):
        if self.calls == self._answers:
            raise Stop(15)
        return super().score(prompts, images)


@pytest.fixture
def config(tmp_path: Path, karlo_folder: Path) -> TrainerConfig:
    return short_config(tmp_path, karlo_folder)


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, karlo_folder: Path
) -> tuple[Path, dict[str, object]]:
    """A run of four iterations and what it comes to."""
    config = short_config(tmp_path_factory.mktemp("whole"), karlo_folder)
    run = RunFolder.create(config)
    train(config, run)
    return run.path, essence(run.path)


def end_in(config: TrainerConfig, answers: int) -> Path:
    """A run that was stopped in the middle of so many-th answer of the service."""
    run = RunFolder.create(config)
    with pytest.raises(Stop):
        train(config, run, Interrupted(answers))
    run.close()
    return run.path


def go_on(path: Path, config: TrainerConfig, scorer: FakeScorer | None = None) -> RunFolder:
    run = RunFolder.resume(path)
    try:
        train(config, run, scorer)
    finally:
        run.close()
    return run


# Answers of the service: to the base's evaluation, the four iterations, those after two and four, the last.
BASE, FIRST, SECOND, _, THIRD, FOURTH, _, LAST = accumulate((0, 2, 2, 2, 1, 2, 2, 1))
ALL = LAST + 2


@pytest.mark.parametrize("answers", [BASE, FIRST, FIRST + 1, THIRD - 1, THIRD, FOURTH + 1, LAST - 1, LAST])
def test_an_ended_run_goes_on_to_the_same_end(
    answers: int, config: TrainerConfig, uninterrupted: tuple[Path, dict[str, object]]
) -> None:
    """Adapter, average, optimizer, deviations, metrics, evaluation and images: bitwise equal."""
    path = end_in(config, answers)
    go_on(path, config)
    assert essence(path) == uninterrupted[1]


def test_two_iterations_and_two_more_are_four(tmp_path: Path, karlo_folder: Path) -> None:
    """A finished run may be given more iterations, and is then the longer run."""
    four = short_config(tmp_path, karlo_folder, update={"micro_batch": 4})
    whole = RunFolder.create(four)
    train(four, whole)
    two = RunFolder.create(four.model_copy(update={"iterations": 2}))
    train(four.model_copy(update={"iterations": 2}), two)
    assert is_finished(two, 2)
    resumed = resumed_config(two.path, None, ["iterations=4"])
    assert not is_finished(two, resumed.iterations)
    train(resumed, two)
    assert essence(two.path)["tensors"] == essence(whole.path)["tensors"]
    assert metrics(two.path) == metrics(whole.path)
    assert (two.path / "evaluation.json").read_bytes() == (whole.path / "evaluation.json").read_bytes()


def test_the_base_is_measured_once(config: TrainerConfig) -> None:
    """Going on repeats no evaluation that is done: only the iterations and the last evaluation are scored."""
    path = end_in(config, FIRST + 1)
    scorer = FakeScorer()
    go_on(path, config, scorer)
    assert scorer.calls == ALL - FIRST


def test_a_stop_saves_what_is_complete(tmp_path: Path, karlo_folder: Path) -> None:
    """Also between two checkpoints: only the iteration under way is lost."""
    config = short_config(tmp_path, karlo_folder, checkpoints={"every": 100})
    path = end_in(config, FOURTH + 1)
    assert max(p.name for p in (path / "checkpoints").glob("iteration-*")) == "iteration-000003"
    go_on(path, config)
    assert len(metrics(path)) == 4


def test_a_kill_between_checkpoints_logs_no_iteration_twice(
    tmp_path: Path, karlo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines beyond the checkpoint, and half a line, are cut off before they are written again."""
    config = short_config(tmp_path, karlo_folder, checkpoints={"every": 2})
    monkeypatch.setattr("trainer.runs.checkpoints.Checkpoints.flush", _only_when_due)
    path = end_in(config, FOURTH + 1)
    assert [record["iteration"] for record in metrics(path)] == [0, 1, 2]
    monkeypatch.undo()
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 3, "comp')
    go_on(path, config)
    assert [record["iteration"] for record in metrics(path)] == [0, 1, 2, 3]


def _only_when_due(checkpoints) -> None:
    """What a kill leaves: the checkpoints whose turn had come."""
    if checkpoints.pending is not None and checkpoints.pending.done % checkpoints.config.every == 0:
        checkpoints.save(checkpoints.pending)
        checkpoints.pending = None


def test_a_broken_checkpoint_is_passed_over(
    config: TrainerConfig, uninterrupted: tuple[Path, dict[str, object]]
) -> None:
    """One flipped bit in the newest: the one before it is gone on from, to the same end."""
    path = end_in(config, FOURTH)
    file = path / "checkpoints" / "iteration-000003" / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    go_on(path, config)
    assert essence(path) == uninterrupted[1]


@pytest.mark.parametrize("file", ["base.npz", "checkpoints/best.json"])
def test_what_can_be_made_again_may_be_damaged(
    file: str, config: TrainerConfig, uninterrupted: tuple[Path, dict[str, object]]
) -> None:
    """Cut in the middle, the base's measurement is repeated and the best marked anew: the end is the same."""
    path = end_in(config, FOURTH)
    content = (path / file).read_bytes()
    (path / file).write_bytes(content[: len(content) // 2])
    go_on(path, config)
    assert essence(path) == uninterrupted[1]


# ------------------------------------------------------------------------------------------ refusals


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again_in_silence(
    config: TrainerConfig,
) -> None:
    """What was logged stays, and the remedies are named."""
    path = end_in(config, FOURTH)
    for file in (path / "checkpoints").glob("*/tensors.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    logged = (path / "metrics.jsonl").read_bytes()
    with pytest.raises(StorageError, match=r"none of its \d checkpoints is whole; begin a new run"):
        go_on(path, config)
    assert (path / "metrics.jsonl").read_bytes() == logged


def test_what_decides_the_result_cannot_change(config: TrainerConfig) -> None:
    """Refused by name with both values; what decides nothing may change."""
    run = RunFolder.create(config)
    for override, said in (
        ("update.learning_rate=0.5", r"trainer\.update\.learning_rate: 0\.5, but .* began with 0\.001"),
        ("seed=7", r"trainer\.seed: 7, but .* began with 0"),
        ("iterations=5", r"cosine update\.schedule depends on"),
        ("objective.weights={red: 1}", r"objective\.weights\.dark: nothing, but .* began with 0\.5"),
    ):
        with pytest.raises(ConfigError, match=said):
            resumed_config(run.path, None, [override])
    free = ["threads=2", "service.url=http://elsewhere", "checkpoints.keep=9", "sampling.micro_batch=2"]
    free += ["memory.offload=idle", "update.gradient_checkpointing=true"]  # after running out of memory
    resumed = resumed_config(run.path, None, free)
    assert (resumed.threads, resumed.service.url, resumed.checkpoints.keep) == (2, "http://elsewhere", 9)


def test_a_configuration_edited_in_the_folder_is_noticed(config: TrainerConfig) -> None:
    """The checkpoint knows with what it was made."""
    path = end_in(config, THIRD)
    text = (path / "config.yaml").read_text()
    (path / "config.yaml").write_text(text.replace("weight_decay: 0.01", "weight_decay: 0.5"))
    edited = resumed_config(path, None, [])
    with pytest.raises(ConfigError, match=r"update\.weight_decay: 0\.5, but .* began with 0\.01"):
        go_on(path, edited)


def test_iterations_that_are_done_cannot_be_taken_back(tmp_path: Path, karlo_folder: Path) -> None:
    """Fewer iterations than the run has behind it are refused."""
    config = short_config(tmp_path, karlo_folder, update={"micro_batch": 4})
    path = end_in(config, FOURTH)
    with pytest.raises(ConfigError, match=r"iterations: 2, but .* has 3 behind it"):
        go_on(path, config.model_copy(update={"iterations": 2}))


def test_another_judge_is_refused_by_name(config: TrainerConfig) -> None:
    """Scores of two judges are not comparable: which evaluator differs, and in what."""
    path = end_in(config, FIRST)

    class Other(FakeScorer):
        identity = {"dark": "d/1", "red": "r/2"}  # noqa: RUF012

    with pytest.raises(StorageError, match=r"red's calibration is 2, was 1; .*begin a new run"):
        go_on(path, config, Other())


def test_the_prompts_are_those_of_the_beginning(config: TrainerConfig) -> None:
    """The run keeps them: a prompt file that was edited meanwhile changes nothing."""
    from trainer.runs.folder import pinned_prompts

    path = end_in(config, FIRST)
    before = pinned_prompts(RunFolder(path), config)
    config.prompts.train.write_text("something else")
    assert pinned_prompts(RunFolder(path), config) == before


# ------------------------------------------------------------------------------------------- folders


def test_two_trainers_never_write_one_run(config: TrainerConfig) -> None:
    """The second is told who is writing; when the first ends, the way is free."""
    run = RunFolder.create(config)
    with pytest.raises(StorageError, match=r"another trainer \(process \d+\) is writing"):
        RunFolder.resume(run.path)
    run.close()
    RunFolder.resume(run.path)


def test_the_newest_run_of_a_name_is_found(config: TrainerConfig) -> None:
    """Begun last counts; other names, and folders without a configuration, do not."""
    with pytest.raises(ConfigError, match="no run named short"):
        newest_run(config)
    RunFolder.create(config)
    second = RunFolder.create(config)
    RunFolder.create(config.model_copy(update={"name": "short-er"}))
    (config.runs_dir / "short-9").mkdir()
    assert newest_run(config) == second.path


def test_what_was_being_written_is_cleared_away(config: TrainerConfig) -> None:
    """Debris of a kill does not pile up and is not mistaken for anything."""
    path = end_in(config, SECOND)
    for folder in (path, path / "checkpoints"):
        (folder / ".writing-x").mkdir()
        (folder / ".removing-y").mkdir()
        (folder / ".z.json.partial").touch()
    go_on(path, config)
    hidden = {p.name for p in path.rglob(".*")}
    assert hidden == {".lock"}
    assert newest(path)


def test_finished_says_so(uninterrupted: tuple[Path, dict[str, object]]) -> None:
    """Everything there, and known to be."""
    assert is_finished(RunFolder(uninterrupted[0]), 4)
    finished = json.loads((uninterrupted[0] / "finished.json").read_text())
    assert finished == {"iterations": 4, "reached": 4, "done": 4}


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    """SIGKILL at six random moments, writing included; `make kill-test` does it at twenty-five."""
    command = [
        sys.executable,
        "-m",
        "tests.support.trainer.kill_driver",
        str(tmp_path / "runs"),
        "--kills",
        "6",
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 checkpoints were found half there" in done.stdout
