"""The real command against the real service: signals, and a reward service that is killed in mid-iteration."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml

from reward_service.client import RewardClient
from tests.support.trainer.resumable import essence, short_config, train
from trainer.config import ServiceConfig, TrainerConfig
from trainer.rl.rewards import Images, Scores, ServiceScorer
from trainer.runs.folder import METRICS_FILE, RunFolder

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[3]
MINIATURE = REPOSITORY / "configs" / "miniature.yaml"
WEIGHTS = {"aesthetic": 1.0, "clip": 1.0, "pickscore": 1.0, "hpsv2": 1.0}


class Service:
    """The miniature's judge as a process of its own on one port, however often it is started."""

    def __init__(self, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "reward_service", "serve", "--config", str(MINIATURE)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--port", str(self.port)], cwd=REPOSITORY, stdout=log, stderr=log
            )
        with RewardClient(self.url) as client:
            client.wait_until_ready(120)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    started = Service(tmp_path / "service.log")
    try:
        started.start()
        yield started
    finally:
        started.kill()


class Killing:
    """The service's scores; before the n-th request the service is killed, and started again meanwhile."""

    def __init__(self, scorer: ServiceScorer, service: Service, request: int) -> None:
        self._scorer, self._service, self._left = scorer, service, request
        self.evaluators, self.identity = scorer.evaluators, scorer.identity
        self._restart = threading.Thread(target=service.start)

    def score(self, prompts: Sequence[str], images: Images) -> Scores:
        self._left -= 1
        if self._left == 0:
            self._service.kill()
            self._restart.start()
        return self._scorer.score(prompts, images)

    def restarted(self) -> bool:
        self._restart.join()
        return True


def test_a_judge_that_is_killed_in_mid_iteration_changes_nothing(
    tmp_path: Path, karlo_folder: Path, service: Service
) -> None:
    """The trainer asks until it is back, and comes to the same result."""
    config = short_config(
        tmp_path,
        karlo_folder,
        iterations=2,
        service={"url": service.url, "deterministic": True},
        objective={"weights": WEIGHTS},
        evaluation={"images_per_prompt": 2, "resamples": 100},
    )
    with ServiceScorer.connect(config.service) as scorer:
        whole, killed = RunFolder.create(config), RunFolder.create(config)
        train(config, whole, scorer)
        killing = Killing(scorer, service, request=3)
        train(config, killed, killing)
        assert killing.restarted()
    assert essence(killed.path) == essence(whole.path)


def begin(arguments: Sequence[str], said: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "trainer", "train", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with said.open("wb") as output:
        return subprocess.Popen(command, cwd=REPOSITORY, stdout=output, stderr=output, env=environment)


def wait_for_iterations(run: Path, count: int) -> None:
    deadline = time.monotonic() + 90
    metrics = run / METRICS_FILE
    while not metrics.exists() or metrics.read_text().count("\n") < count:
        assert time.monotonic() < deadline, "no iteration within 90 s"
        time.sleep(0.05)


def last_line(said: Path) -> str:
    return said.read_text().splitlines()[-1].rpartition("\r")[2]


def test_signals_leave_at_once_and_say_how_to_go_on(
    tmp_path: Path, karlo_folder: Path, service: Service
) -> None:
    """SIGTERM is 143; Ctrl-C, while the service is gone and the client asks again and again, is 130."""
    config = short_config(
        tmp_path,
        karlo_folder,
        iterations=1000,
        service=ServiceConfig(url=service.url).model_dump(),
        objective={"weights": WEIGHTS},
        evaluation={"images_per_prompt": 2},
    )
    assert isinstance(config, TrainerConfig)
    file, run, said = tmp_path / "config.yaml", tmp_path / "a run", tmp_path / "said.txt"
    file.write_text(yaml.safe_dump({"trainer": config.model_dump(mode="json")}))

    trainer = begin(["--config", str(file), "--run", str(run)], said)
    wait_for_iterations(run, 2)
    trainer.send_signal(signal.SIGTERM)
    assert trainer.wait(20) == 143
    advice = f"go on with: reward-trainer train --resume --run '{run}'"
    assert last_line(said) == f"reward-trainer: stopped by SIGTERM; {advice}"
    assert list((run / "checkpoints").glob("iteration-*"))

    done = (run / METRICS_FILE).read_text().count("\n")
    trainer = begin(["--resume", str(run)], said)
    wait_for_iterations(run, done + 2)
    service.kill()
    time.sleep(1.5)
    trainer.send_signal(signal.SIGINT)
    assert trainer.wait(20) == 130
    assert last_line(said) == f"reward-trainer: stopped by SIGINT; {advice}"
    assert "Traceback" not in said.read_text()
