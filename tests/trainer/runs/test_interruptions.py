"""Interruptions of the real command and the real service: signals, and a reward service that is killed."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import yaml

from reward_service.client import RewardClient
from tests.support.trainer.resumable import comparable_content, short_config, train
from trainer.config import ServiceConfig, TrainerConfig
from trainer.rl.rewards import Images, Scores, ServiceScorer
from trainer.runs.folder import METRICS_FILE, RunFolder

WAIT_S = 600.0  # until an event that takes seconds on an idle machine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * WAIT_S)]

REPOSITORY = Path(__file__).parents[3]
MINIATURE = REPOSITORY / "configs" / "miniature.yaml"
WEIGHTS = {"aesthetic": 1.0, "clip": 1.0, "pickscore": 1.0, "hpsv2": 1.0}


class ServiceProcess:
    """The miniature's reward service in its own process, on one port across restarts."""

    def __init__(self, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def config(self) -> ServiceConfig:
        """Connection that outlasts a restart of the service on a slow machine."""
        return ServiceConfig(
            url=f"http://127.0.0.1:{self.port}",
            timeout_s=WAIT_S,
            retry_budget_s=WAIT_S,
            ready_timeout_s=WAIT_S,
            deterministic=True,
        )

    def start(self) -> None:
        command = [sys.executable, "-m", "reward_service", "serve", "--config", str(MINIATURE)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--port", str(self.port)], cwd=REPOSITORY, stdout=log, stderr=log
            )
        with RewardClient(self.config.url) as client:
            client.wait_until_ready(WAIT_S)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def wait_for_retries(self, count: int) -> None:
        """Wait, while the service is gone, until a client has tried to connect `count` times."""
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.settimeout(WAIT_S)
            listener.bind(("127.0.0.1", self.port))
            listener.listen()
            for _ in range(count):
                listener.accept()[0].close()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceProcess]:
    process = ServiceProcess(tmp_path / "service.log")
    try:
        process.start()
        yield process
    finally:
        process.kill()


class ServiceKillingScorer:
    """Scorer that kills the service before the n-th request, and restarts it meanwhile."""

    def __init__(self, scorer: ServiceScorer, service: ServiceProcess, request: int) -> None:
        self._scorer, self._service, self._remaining = scorer, service, request
        self.evaluators, self.identity = scorer.evaluators, scorer.identity
        self._restart = threading.Thread(target=service.start)

    def score(self, prompts: Sequence[str], images: Images) -> Scores:
        self._remaining -= 1
        if self._remaining == 0:
            self._service.kill()
            self._restart.start()
        return self._scorer.score(prompts, images)

    def restarted(self) -> bool:
        self._restart.join()
        return True


def test_killed_service_does_not_change_the_result(
    tmp_path: Path, karlo_folder: Path, service: ServiceProcess
) -> None:
    """The trainer retries until the service is back, and comes to the same result."""
    config = short_config(
        tmp_path,
        karlo_folder,
        iterations=2,
        service=service.config.model_dump(),
        objective={"weights": WEIGHTS},
        evaluation={"images_per_prompt": 2, "resamples": 100},
    )
    with ServiceScorer.connect(config.service) as scorer:
        uninterrupted, interrupted = RunFolder.create(config), RunFolder.create(config)
        train(config, uninterrupted, scorer)
        killing = ServiceKillingScorer(scorer, service, request=3)
        train(config, interrupted, killing)
        assert killing.restarted()
    assert comparable_content(interrupted.path) == comparable_content(uninterrupted.path)


def start_trainer(arguments: Sequence[str], output: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "trainer", "train", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with output.open("wb") as file:
        return subprocess.Popen(command, cwd=REPOSITORY, stdout=file, stderr=file, env=environment)


def wait_for_iterations(trainer: "subprocess.Popen[bytes]", run: Path, count: int) -> None:
    """Wait until metrics.jsonl has `count` lines."""
    metrics = run / METRICS_FILE
    wait_until(
        lambda: metrics.exists() and metrics.read_text().count("\n") >= count,
        f"iteration {count}",
        lambda: trainer.poll() is None,
    )


def wait_until(condition: Callable[[], bool], event: str, alive: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert alive(), f"the trainer ended before {event}"
        assert time.monotonic() < deadline, f"no {event} within {WAIT_S:.0f} s"
        time.sleep(0.05)


def last_line(output: Path) -> str:
    return output.read_text().splitlines()[-1].rpartition("\r")[2]


def test_signals_end_the_trainer_with_a_hint_to_resume(
    tmp_path: Path, karlo_folder: Path, service: ServiceProcess
) -> None:
    """SIGTERM gives exit code 143; Ctrl-C, while the service is gone and the client retries, gives 130."""
    config = short_config(
        tmp_path,
        karlo_folder,
        iterations=1000,
        service=service.config.model_dump(),
        objective={"weights": WEIGHTS},
        evaluation={"images_per_prompt": 2},
    )
    assert isinstance(config, TrainerConfig)
    file, run, output = tmp_path / "config.yaml", tmp_path / "a run", tmp_path / "output.txt"
    file.write_text(yaml.safe_dump({"trainer": config.model_dump(mode="json")}))

    trainer = start_trainer(["--config", str(file), "--run", str(run)], output)
    wait_for_iterations(trainer, run, 2)
    trainer.send_signal(signal.SIGTERM)
    assert trainer.wait(WAIT_S) == 143
    hint = f"resume with: reward-trainer train --resume --run '{run}'"
    assert last_line(output) == f"reward-trainer: stopped by SIGTERM; {hint}"
    assert list((run / "checkpoints").glob("iteration-*"))

    done = (run / METRICS_FILE).read_text().count("\n")
    trainer = start_trainer(["--resume", str(run)], output)
    wait_for_iterations(trainer, run, done + 2)
    service.kill()
    service.wait_for_retries(2)
    trainer.send_signal(signal.SIGINT)
    assert trainer.wait(WAIT_S) == 130
    assert last_line(output) == f"reward-trainer: stopped by SIGINT; {hint}"
    assert "Traceback" not in output.read_text()
