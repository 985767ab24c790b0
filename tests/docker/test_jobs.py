"""Three jobs and one scorer: stops, kills and restarts, fair shares, errors, removal."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import docker
import httpx
import pytest

from tests.docker.composing import ROOT, Composition
from tests.docker.conftest import serving

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(1800)]

NAMES = tuple(f"test-{os.getpid()}-{letter}" for letter in "abc")
UNSTOPPED, STOPPED = NAMES[:2]
LATE = f"test-{os.getpid()}-late"
MEASURED = 4  # iterations
# Scores that do not depend on other requests, or on restarts: then neither do the results.
SETTINGS = {
    "service.deterministic": "true",
    "checkpoints.every": 1,
    "iterations": 12,
    "prompts.validation_limit": 4,
    "rollout.prompts_per_iteration": 4,
    "evaluation.images_per_prompt": 2,
}
TRAIN = ["train", "--config", "configs/miniature.yaml", "--seed", "1"]
TRAIN += [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]


def jobs(*words: str, service: Composition | None = None) -> subprocess.CompletedProcess[str]:
    """Run `reward-trainer jobs WORDS`, with the runs and the scorer of a composition if one is given."""
    # The machine may have a scorer of its own.
    own = ["--runs", str(service.runs), "--scorer", service.container] if service else []
    return subprocess.run(
        [sys.executable, "-m", "trainer", "jobs", words[0], *own, *words[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def run_jobs(*words: str, service: Composition | None = None) -> str:
    """Run a command that must succeed, and return its output."""
    done = jobs(*words, service=service)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def states() -> dict[str, str]:
    """Return the state of each of these jobs from `jobs list`."""
    return {
        job["name"]: job["state"] for job in json.loads(jobs("list", "--json").stdout) if job["name"] in NAMES
    }


@pytest.fixture(scope="module")
def service(
    images: None, engine: docker.DockerClient, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Composition]:
    """Yield a composition with a scorer; remove it and all jobs afterwards."""
    with serving(tmp_path_factory.mktemp("runs"), "jobs") as composition:
        try:
            yield composition
        finally:
            for name in (*NAMES, LATE):
                for container in engine.containers.list(all=True, filters={"name": f"job-{name}"}):
                    container.remove(force=True)


class Observed(NamedTuple):
    """Observations while three jobs ran."""

    runs: Path
    attributes: dict[str, dict[str, object]]
    shares: dict[str, float]
    stopped: str
    listed: str
    waited: str
    states: dict[str, str]


def pairs(url: str, key: str) -> dict[str, float]:
    """Return the number of pairs scored for each job, from the scorer's metrics."""
    text = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {key}"}).text
    return {
        name: float(count)
        for name, count in re.findall(r'^reward_client_pairs_total\{client="job-([^"]+)"\} (\S+)', text, re.M)
    }


@pytest.fixture(scope="module")
def observed(service: Composition, engine: docker.DockerClient) -> Observed:
    """Run three jobs at once; stop and resume one, kill the scorer, and wait for all."""
    key = service.key("watch")
    for name in NAMES:
        run_jobs("submit", "--name", name, "--cpus", "1", "--memory", "4g", *TRAIN, service=service)
    attributes = {name: engine.containers.get(f"karlo-reward-lab-job-{name}").attrs for name in NAMES}
    shares = measure_shares(service, key)
    stopped = run_jobs("stop", STOPPED)
    assert states()[STOPPED] == "stopped"
    scorer = engine.containers.get(service.containers(engine)["reward"].id)
    scorer.kill()
    listed = run_jobs("list")
    run_jobs("resume", STOPPED)
    scorer.kill()
    waited = run_jobs("wait", *NAMES)
    return Observed(service.runs, attributes, shares, stopped, listed, waited, states())


def measure_shares(service: Composition, key: str) -> dict[str, float]:
    """Return the share of each job in the scored pairs per second, over some iterations of each.

    The pairs of an iteration come all at once: the rate is that between the first and the last iteration.
    """
    deadline = time.monotonic() + 1500
    counts: dict[str, list[tuple[float, float]]] = {name: [] for name in NAMES}
    while min(map(len, counts.values())) < MEASURED + 2:
        assert time.monotonic() < deadline, states()
        if all((service.runs / name / "checkpoints").exists() for name in NAMES):
            for name, count in pairs(service.url, key).items():
                if name in counts and (not counts[name] or counts[name][-1][1] != count):
                    counts[name].append((time.monotonic(), count))
        time.sleep(0.1)
    rates = {}
    for name, (_, (start_s, first), *_, (end_s, last)) in counts.items():
        rates[name] = (last - first) / (end_s - start_s)
    return {name: rate / sum(rates.values()) for name, rate in rates.items()}


def test_all_jobs_are_done(observed):
    """Each has a LoRA and a report, in spite of the stop and the kills."""
    assert observed.states == dict.fromkeys(NAMES, "done")
    for name in NAMES:
        assert next((observed.runs / name / "lora").glob("*.safetensors"))
        assert (observed.runs / name / "report.html").exists()


def test_scorer_is_shared_evenly(observed):
    """Each job's share of the pairs is within 20 % of the others'."""
    print("shares:", {name: round(share, 3) for name, share in observed.shares.items()})
    assert max(observed.shares.values()) / min(observed.shares.values()) < 1.2


def test_stopped_job_ends_with_the_same_numbers(observed):
    """The results equal those of an uninterrupted job, bit for bit."""
    assert "stopped" in observed.stopped
    uninterrupted, stopped = (
        (observed.runs / name / "evaluation.json").read_text() for name in (UNSTOPPED, STOPPED)
    )
    assert uninterrupted == stopped


def test_killed_scorer_is_restarted(observed):
    """The engine does not restart it after `docker kill`; `jobs list` and `jobs wait` do."""
    for output in (observed.listed, observed.waited):
        assert output.count("was killed; it has been restarted") == 1


@pytest.mark.parametrize("name", NAMES)
def test_job_has_no_privileges(observed, name):
    """No root, no capabilities, a read-only file system, its limits; its key is not visible."""
    attributes = observed.attributes[name]
    host = attributes["HostConfig"]
    assert attributes["Config"]["User"].partition(":")[0] not in ("", "0", "root")
    assert host["ReadonlyRootfs"]
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert "no-new-privileges:true" in host["SecurityOpt"]
    assert host["NanoCpus"] == 1e9
    assert host["Memory"] == host["MemorySwap"] == 4 * 2**30
    assert "rk_" not in str(attributes)


def test_invalid_requests_print_one_line(observed, service):
    """A used name, a job that is done or missing, a missing image, too many cores, too little memory."""
    for words, message in {
        ("submit", "--name", NAMES[0], "train"): "exists; choose another --name",
        ("resume", NAMES[0]): "is done",
        ("stop", NAMES[0]): "is not running",
        ("stop", NAMES[0][:-1] + "x"): "did you mean test-",
        ("submit", "--name", "x", "--image", "no/such", "train"): "docker compose build",
        ("submit", "--name", "x", "--cpus", "4096", "train"): "--cpus",
        ("submit", "--name", "x", "--memory", "1k", "train"): "--memory",
        ("submit", "--name", "x", "--network", "n", "--url", "http://h", "train"): "network",
        ("submit", "--name", "x", "--scorer", "nobody", "train"): "no scorer 'nobody' is running",
    }.items():
        done = jobs(*words, service=service if words[0] == "submit" else None)
        assert done.returncode == 2, (words, done.stdout)
        assert message in done.stderr, (words, done.stderr)
        assert done.stderr.count("\n") == 1
        assert not (service.runs / "x").exists()
        assert not (service.runs / ".jobs/x").exists()


def test_missing_gpu_is_an_error(observed, service, engine):
    """Nothing is left of the job, its key included."""
    if "nvidia" in engine.info()["Runtimes"]:
        pytest.skip("this engine has GPUs")
    done = jobs("submit", "--name", "x", "--gpus", "all", "train", service=service)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "leave --gpus out" in done.stderr
    assert not engine.containers.list(all=True, filters={"name": "karlo-reward-lab-job-x"})
    assert "job-x" not in service("exec", "-T", "reward", "cat", "/keys/keys.yaml").stdout


def test_failed_job_is_reported_with_its_last_line(observed, service):
    """`wait` exits with 1 and the job's last line; `remove` removes the job and its key, but not the run."""
    name = NAMES[0]
    run_jobs("remove", name)
    assert name not in states()
    assert f"job-{name}" not in service("exec", "-T", "reward", "cat", "/keys/keys.yaml").stdout
    assert (service.runs / name / "report.html").exists()
    assert not (service.runs / ".jobs" / name).exists()
    run_jobs("submit", "--name", name, "variance", "--set", "prompts.train=/nowhere.txt", service=service)
    done = jobs("wait", name)
    assert done.returncode == 1
    assert f"{name}: failed (2): reward-trainer: " in done.stderr
    assert "/nowhere.txt" in done.stderr
    assert "/nowhere.txt" in run_jobs("logs", "-f", name)


def test_job_resumes_after_the_composition_was_recreated(observed, service):
    """After `down --volumes` and `up`, network and keys are new: `resume` updates both."""
    run_jobs("submit", "--name", LATE, *TRAIN, "--set", "iterations=1", service=service)
    run_jobs("stop", LATE)
    service("down", "--volumes", "--timeout", "5")
    up = service("up", "-d", "reward")
    assert up.returncode == 0, up.stdout
    run_jobs("resume", LATE)
    assert f"{LATE}: done" in run_jobs("wait", LATE)
