"""Three jobs and one scorer: all end whatever befalls them, and share it fairly."""

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
WATCHED = 4  # iterations
# Scores that do not depend on who else is scored, or on restarts: then neither do the results.
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
    """`reward-trainer jobs WORDS`, output captured; with a reward service, it is that one's runs and scorer."""
    # The machine may have a scorer of its own.
    own = ["--runs", str(service.runs), "--scorer", service.container] if service else []
    return subprocess.run(
        [sys.executable, "-m", "trainer", "jobs", words[0], *own, *words[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def well(*words: str, service: Composition | None = None) -> str:
    """The same, which has to end well; what it says."""
    done = jobs(*words, service=service)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def states() -> dict[str, str]:
    """Each of these jobs' state, as `jobs list` tells it."""
    return {
        job["name"]: job["state"] for job in json.loads(jobs("list", "--json").stdout) if job["name"] in NAMES
    }


@pytest.fixture(scope="module")
def service(
    images: None, engine: docker.DockerClient, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Composition]:
    """A scorer in a composition, and afterwards neither it nor a job."""
    with serving(tmp_path_factory.mktemp("runs"), "jobs") as composition:
        try:
            yield composition
        finally:
            for name in (*NAMES, LATE):
                for container in engine.containers.list(all=True, filters={"name": f"job-{name}"}):
                    container.remove(force=True)


class Story(NamedTuple):
    """What was seen while three jobs ran."""

    runs: Path
    users: dict[str, dict[str, object]]
    shares: dict[str, float]
    stopped: str
    listed: str
    waited: str
    states: dict[str, str]


def pairs(url: str, key: str) -> dict[str, float]:
    """How many pairs the scorer has scored for each job, by its own metrics."""
    text = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {key}"}).text
    return {
        name: float(count)
        for name, count in re.findall(r'^reward_client_pairs_total\{client="job-([^"]+)"\} (\S+)', text, re.M)
    }


@pytest.fixture(scope="module")
def story(service: Composition, engine: docker.DockerClient) -> Story:
    """Three jobs at once; one is stopped and resumed, the scorer is killed, and all are waited for."""
    key = service.key("watch")
    for name in NAMES:
        well("submit", "--name", name, "--cpus", "1", "--memory", "4g", *TRAIN, service=service)
    found = {name: engine.containers.get(f"karlo-reward-lab-job-{name}").attrs for name in NAMES}
    shares = watched_shares(service, key)
    stopped = well("stop", STOPPED)
    assert states()[STOPPED] == "stopped"
    scorer = engine.containers.get(service.containers(engine)["reward"].id)
    scorer.kill()
    listed = well("list")
    well("resume", STOPPED)
    scorer.kill()
    waited = well("wait", *NAMES)
    return Story(service.runs, found, shares, stopped, listed, waited, states())


def watched_shares(service: Composition, key: str) -> dict[str, float]:
    """The share of each job in what is scored a second while all of them train, for some iterations of each.

    A job's pairs come all at once, an iteration's: its rate is that between the first and the last of them.
    """
    deadline = time.monotonic() + 600
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in NAMES}
    while min(map(len, seen.values())) < WATCHED + 2:
        assert time.monotonic() < deadline, states()
        if all((service.runs / name / "checkpoints").exists() for name in NAMES):
            for name, count in pairs(service.url, key).items():
                if name in seen and (not seen[name] or seen[name][-1][1] != count):
                    seen[name].append((time.monotonic(), count))
        time.sleep(0.1)
    rates = {}
    for name, (_, (start_s, first), *_, (end_s, last)) in seen.items():
        rates[name] = (last - first) / (end_s - start_s)
    return {name: rate / sum(rates.values()) for name, rate in rates.items()}


def test_all_end_well(story):
    """Whatever befell them meanwhile."""
    assert story.states == dict.fromkeys(NAMES, "done")
    for name in NAMES:
        assert next((story.runs / name / "lora").glob("*.safetensors"))
        assert (story.runs / name / "report.html").exists()


def test_the_scorer_is_shared_evenly(story):
    """Each job's share of the pairs is within 20 % of the others'."""
    print("shares:", {name: round(share, 3) for name, share in story.shares.items()})
    assert max(story.shares.values()) / min(story.shares.values()) < 1.2


def test_a_job_that_was_stopped_ends_with_the_same_numbers(story):
    """As one that was not, to the bit."""
    assert "stopped" in story.stopped
    one, other = ((story.runs / name / "evaluation.json").read_text() for name in (UNSTOPPED, STOPPED))
    assert one == other


def test_a_scorer_that_was_killed_is_brought_back(story):
    """`docker kill` is a wish to the engine; whoever lists its jobs or waits for them starts it again."""
    for said in (story.listed, story.waited):
        assert said.count("was ended by force; it has been started again") == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_job_is_locked(story, name):
    """Not root, no capability, a read-only file system, its limits; and its key is nowhere to be seen."""
    found = story.users[name]
    host = found["HostConfig"]
    assert found["Config"]["User"].partition(":")[0] not in ("", "0", "root")
    assert host["ReadonlyRootfs"]
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert "no-new-privileges:true" in host["SecurityOpt"]
    assert host["NanoCpus"] == 1e9
    assert host["Memory"] == host["MemorySwap"] == 4 * 2**30
    assert "rk_" not in str(found)


def test_what_cannot_be_is_told_in_one_line(story, service):
    """A taken name, a job that is done or not there, no such image, too many cores, too little memory."""
    for words, told in {
        ("submit", "--name", NAMES[0], "train"): "there is a job",
        ("resume", NAMES[0]): "is done",
        ("stop", NAMES[0]): "does not run",
        ("stop", NAMES[0][:-1] + "x"): "did you mean test-",
        ("submit", "--name", "x", "--image", "no/such", "train"): "docker compose build",
        ("submit", "--name", "x", "--cpus", "4096", "train"): "--cpus",
        ("submit", "--name", "x", "--memory", "1k", "train"): "--memory",
        ("submit", "--name", "x", "--network", "n", "--url", "http://h", "train"): "network",
        ("submit", "--name", "x", "--scorer", "nobody", "train"): "no scorer 'nobody'",
    }.items():
        done = jobs(*words, service=service if words[0] == "submit" else None)
        assert done.returncode == 2, (words, done.stdout)
        assert told in done.stderr, (words, done.stderr)
        assert done.stderr.count("\n") == 1
        assert not (service.runs / "x").exists()
        assert not (service.runs / ".jobs/x").exists()


def test_a_gpu_that_is_not_there_is_told(story, service, engine):
    """And nothing is left of the job, its key included."""
    if "nvidia" in engine.info()["Runtimes"]:
        pytest.skip("this engine has GPUs")
    done = jobs("submit", "--name", "x", "--gpus", "all", "train", service=service)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "leave --gpus out" in done.stderr
    assert not engine.containers.list(all=True, filters={"name": "karlo-reward-lab-job-x"})
    assert "job-x" not in service("exec", "-T", "reward", "cat", "/keys/keys.yaml").stdout


def test_a_job_that_fails_says_why(story, service):
    """`wait` ends with 1 and the job's last words; `remove` takes the job and its key, and leaves the run."""
    name = NAMES[0]
    well("remove", name)
    assert name not in states()
    assert f"job-{name}" not in service("exec", "-T", "reward", "cat", "/keys/keys.yaml").stdout
    assert (service.runs / name / "report.html").exists()
    assert not (service.runs / ".jobs" / name).exists()
    well("submit", "--name", name, "variance", "--set", "prompts.train=/nowhere.txt", service=service)
    done = jobs("wait", name)
    assert done.returncode == 1
    assert f"{name}: failed (2): reward-trainer: " in done.stderr
    assert "/nowhere.txt" in done.stderr
    assert "/nowhere.txt" in well("logs", "-f", name)


def test_a_job_outlives_the_composition(story, service):
    """After `down --volumes` and `up` network and keys are others: `resume` sees to both."""
    well("submit", "--name", LATE, *TRAIN, "--set", "iterations=1", service=service)
    well("stop", LATE)
    service("down", "--volumes", "--timeout", "5")
    up = service("up", "-d", "reward")
    assert up.returncode == 0, up.stdout
    well("resume", LATE)
    assert f"{LATE}: done" in well("wait", LATE)
