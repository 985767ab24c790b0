"""The command line: one line for what a user can mend, and a run from start to end."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image
from rich.console import Console

from tests.trainer.conftest import PROMPTS, SAMPLING, FakeScorer
from trainer.cli.main import app, main
from trainer.config import TrainerConfig, load_trainer_config
from trainer.data.splits import Split
from trainer.experiments import workers as demo
from trainer.experiments.workers import local_service
from trainer.runtime.errors import DemoError

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    ending = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.getsignal(number) for number in ending}
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.fixture
def config_file(trainer_config: TrainerConfig, tmp_path: Path) -> Path:
    """A configuration file of the tiny world, its service where nobody listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    section = trainer_config.model_dump(mode="json")
    section |= {"runs_dir": "runs", "service": {"url": url, "ready_timeout_s": 0.2}}
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump({"trainer": section}))
    return file


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["reward-trainer", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command"),
        (["fly"], "fly"),
        (["train", "--config", "{missing}"], "missing.yaml"),
        (["train", "--config", "{file}", "--nonsense"], "nonsense"),
        (["train", "--config", "{file}", "--set", "update.learnig_rate=1"], "did you mean 'learning_rate'"),
        (["train", "--config", "{file}", "iterations=none"], "trainer.iterations"),
        (
            ["train", "--config", "{file}", "update.max_grad_norm=.inf"],
            "update.max_grad_norm: input should be a fin",
        ),
        (["train", "--config", "{file}", "--set", "objective.weights={}"], "weight above 0"),
        (["train", "--config", "{file}", "--set", "update.train_steps=[1, 5]"], "deterministic"),
        (["train", "--config", "{file}", "--set", "prompts.train=nowhere.txt"], "no such prompt file"),
        (["train", "--config", "{file}", "--seed", "-1"], "--seed"),
        (["generate", "--config", "{file}", "--prompt", " "], "--prompt is empty"),
        (["generate", "--config", "{file}", "--prompt", "x", "--lora", "{missing}"], "no such LoRA folder"),
        (
            ["generate", "--config", "{file}", "--prompt", "x", "--out", "{missing}/x.png"],
            "folder does not exist",
        ),
        (["generate", "--config", "{file}", "--prompt", "x", "--out", "{folder}"], "it is a folder"),
        (
            ["generate", "--config", "{file}", "--prompt", "x", "--set", "device=abacus"],
            "is not a device of this machine",
        ),
        (["demo", "--config", "{file}", "--run", "{file}"], "the run folder cannot be created"),
        (["demo", "--config", "{file}", "--run", "{folder}"], "not empty"),
        (["generate", "--config", "{file}", "--prompt", "x", "--set", "karlo.path=."], "no Karlo model here"),
        (["generate", "--config", "{file}", "--prompt", "x", "--lora", "{folder}"], "no LoRA here"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    arguments: list[str],
    message: str,
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Cause and remedy on one line, no traceback."""
    places = {"file": config_file, "missing": tmp_path / "missing.yaml", "folder": tmp_path}
    code = run([part.format(**places) if part[0] == "{" else part for part in arguments], monkeypatch)
    complaint = capfd.readouterr().err
    assert code == 2
    assert message in complaint
    assert complaint.startswith("reward-trainer: ")
    assert complaint.count("\n") == 1


def test_unreachable_service_is_reported_before_models_load(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A line while it waits, then the address and the remedy, code 2; no folder is made, no model loaded."""
    assert run(["train", "--config", str(config_file), "--set", "karlo.path=nowhere"], monkeypatch) == 2
    waiting, complaint = capfd.readouterr().err.splitlines()
    assert waiting.startswith("waiting up to 0.2 s")
    assert load_trainer_config(config_file).service.url in complaint
    assert "reward-service serve" in complaint
    assert not (config_file.parent / "runs").exists()


def test_run_writes_its_results_and_generate_uses_them(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """LoRA, grids, metrics and comparison are there, and the LoRA draws other images than the base."""
    from trainer.runs.folder import RunFolder
    from trainer.runs.train import train_run

    config = load_trainer_config(
        config_file, ["iterations=2", "evaluation.images_per_prompt=2", "lora.ema_decay=0"]
    )
    folder = RunFolder.create(config)
    split = Split(PROMPTS, ("held out", "other"), (0, 1))
    result = train_run(config, split, FakeScorer(), folder, Console())
    assert "red" in capfd.readouterr().out
    saved = json.loads((folder.path / "evaluation.json").read_text())
    assert saved["rows"]["composite"]["difference"] == result.evaluation.comparison.composite.difference
    assert len((folder.path / "metrics.jsonl").read_text().splitlines()) == 2
    for name in ("before.png", "after.png", "before_after.png"):
        Image.open(folder.path / name).verify()

    arguments = ["generate", "--config", str(config_file), "--prompt", "x", "--n", "2", "--out"]
    assert run([*arguments, str(tmp_path / "base.png")], monkeypatch) == 0
    assert run([*arguments, str(tmp_path / "tuned.png"), "--lora", str(folder.lora)], monkeypatch) == 0
    base, tuned = (Image.open(tmp_path / name) for name in ("base.png", "tuned.png"))
    assert base.size == tuned.size
    assert base.tobytes() != tuned.tobytes()


def test_resume_needs_an_unfinished_run(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """No run, another result, nothing left to do: each is one line, and none asks the service."""
    from trainer.runs.folder import RESULT_FILES, RunFolder, mark_finished

    command = ["train", "--config", str(config_file), "--resume"]
    assert run(command, monkeypatch) == 2
    assert "no run named run to resume" in capfd.readouterr().err
    folder = RunFolder.create(load_trainer_config(config_file))
    folder.close()
    assert run([*command, "seed=5"], monkeypatch) == 2
    assert f"trainer.seed: 5, but {folder.path} began with 0" in capfd.readouterr().err
    for name in RESULT_FILES:
        (folder.path / name).write_text("{}")
    mark_finished(folder, 40, 2, 2)
    assert run(command, monkeypatch) == 0
    assert f"{folder.path} is finished: its 40 iterations are done" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("command", "default"),
    [("crossval", "NAME-experiment"), ("search", "NAME-experiment"), ("report", "compare.html here")],
)
def test_help_shows_default_paths(command: str, default: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Unescaped brackets are markup and would vanish."""
    app([command, "--help"], standalone_mode=False)
    assert default in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_shipped_configurations_are_valid() -> None:
    """Both files in configs/ resolve, with paths beside them."""
    for name in ("miniature", "karlo"):
        config = load_trainer_config(REPOSITORY / "configs" / f"{name}.yaml")
        assert config.runs_dir == REPOSITORY / "runs"
        assert SAMPLING.decoder_steps != config.sampling.decoder_steps


def fake_service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str) -> None:
    """Have `python -m reward_service` be `program`."""
    package = tmp_path / "fake" / "reward_service"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(textwrap.dedent(program))
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.chdir(package.parent)


def test_demo_service_is_stopped_however_the_demo_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An error in the middle, and a service that ignores SIGTERM, leave no process behind."""
    fake_service(
        monkeypatch,
        tmp_path,
        """
        import os, signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(f"listening on http://127.0.0.1:{os.getpid() % 60000 + 1} pid={os.getpid()}", flush=True)
        time.sleep(600)
        """,
    )
    monkeypatch.setattr(demo, "SERVICE_STOP_TIMEOUT_S", 0.2)
    log = tmp_path / "service.log"
    with pytest.raises(KeyboardInterrupt), local_service(tmp_path / "x.yaml", log):
        raise KeyboardInterrupt
    pid = int(log.read_text().rsplit("pid=", 1)[1])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_during_startup_stops_the_service(
    number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Between the birth of a process and the moment its parent knows it, no signal may part the two."""
    popen = subprocess.Popen
    born: list[subprocess.Popen[bytes]] = []

    def begin(*_: object, **__: object) -> "subprocess.Popen[bytes]":
        born.append(popen([sys.executable, "-c", "import time; time.sleep(600)"]))
        signal.raise_signal(number)
        return born[0]

    def leave(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, leave)
    monkeypatch.setattr(subprocess, "Popen", begin)
    try:
        with pytest.raises(KeyboardInterrupt), local_service(tmp_path / "x.yaml", tmp_path / "log"):
            pass
        assert signal.getsignal(number) is leave
    finally:
        signal.signal(number, before)
    assert born[0].poll() is not None


def test_closed_terminal_ends_the_program_cleanly(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGHUP leaves through the exits that stop what was started; nohup's wish to ignore it is kept."""
    before = signal.getsignal(signal.SIGHUP)
    try:
        for wish, expected in ((signal.SIG_DFL, False), (signal.SIG_IGN, True)):
            signal.signal(signal.SIGHUP, wish)
            run(["train", "--config", str(config_file), "iterations=0"], monkeypatch)
            assert (signal.getsignal(signal.SIGHUP) is wish) is expected
    finally:
        signal.signal(signal.SIGHUP, before)


def test_demo_service_that_dies_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its last output line, and the path of the log."""
    fake_service(monkeypatch, tmp_path, "import sys; print('no weights'); sys.exit(2)")
    with (
        pytest.raises(DemoError, match=r"code 2: no weights .*service\.log"),
        local_service(tmp_path / "x.yaml", tmp_path / "service.log"),
    ):
        pass


def test_checks_before_training_need_no_torch() -> None:
    """A typo in the configuration is reported at once, not after torch has loaded."""
    program = "import sys, trainer.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=False).returncode == 0
