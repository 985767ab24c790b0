"""`reward-trainer jobs`: what is checked before a container is made, and what the engine's errors become."""

import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import typer
from docker.errors import APIError, DockerException, ImageNotFound
from requests.exceptions import ConnectionError as Refused
from rich.console import Console

from trainer.cli.jobs import table
from trainer.cli.main import app
from trainer.config import ConfigError
from trainer.jobs.docker import KEYS, engine, find_scorer, meaning, network_of, revive
from trainer.jobs.jobs import JOB, SCORER, Job, Limits, Submission, read_key, submit
from trainer.jobs.submit import Asking, check_command, cores, environment, mounts
from trainer.jobs.wait import mend, wait
from trainer.runtime.errors import ContainerError

ROOT = typer.main.get_command(app)
SHARED = Asking("http://reward:8000", with_key=True)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("trainer: {prompts: {train: p.txt}, karlo: {path: m}, objective: {weights: {clip: 1}}}\n")
    return path


def test_what_was_given_comes_after_what_a_job_sets(config):
    """The user's own settings win; the configuration is where the container has it."""
    checked = check_command(ROOT, ["train", "--config", str(config), "--set", "service.retry_budget_s=5"])
    words = checked.inside("mine", SHARED)
    assert words[:3] == ["train", "--run", "/runs/mine"]
    assert words[-4:] == ["--config", "/app/configs/mine.yaml", "--set", "service.retry_budget_s=5"]
    assert words.index("service.retry_budget_s=600") < len(words) - 1
    assert {'service.url="http://reward:8000"', 'service.client_id="mine"'} <= set(words)
    assert 'service.api_key_file="/run/secrets/reward_key"' in words
    assert checked.config == config
    assert checked.resumable


@pytest.mark.parametrize("form", [["--config={}"], ["--config", "{}"]])
def test_both_forms_of_the_configuration_are_found(config, form):
    """`--config=FILE` is the same as `--config FILE`."""
    words = check_command(ROOT, ["crossval", *(part.format(config) for part in form)]).inside("x", SHARED)
    assert str(config) not in " ".join(words)
    assert "/app/configs/mine.yaml" in " ".join(words)


def test_without_a_key_none_is_named():
    """A scorer that asks for no key is asked without one."""
    words = check_command(ROOT, ["train"]).inside("x", Asking("http://x", with_key=False))
    assert not [word for word in words if "api_key_file" in word]


def test_a_report_asks_no_scorer():
    """Commands without a configuration get no settings that they would not know."""
    assert check_command(ROOT, ["report", "/runs/a"]).inside("x", SHARED) == ["report", "/runs/a"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "nothing to run"),
        (["trian"], "no command of reward-trainer; jobs run crossval, generate"),
        (["fold", "0"], "no command"),
        (["demo"], "submit `train`"),
        (["jobs", "list"], "cannot submit"),
        (["train", "--config", "/"], "no such configuration"),
        (["train", "--help"], "reward-trainer train --help"),
        (["crossval", "--judge"], "leave --judge out"),
        (["train", "--run", "runs/x"], "leave --run out"),
        (["train", "--config", "/nowhere.yaml"], "/nowhere.yaml: no such configuration"),
        (["train", "--config", "{config}", "--set", "iterationz=3"], "did you mean 'iterations'"),
        (["search", "--config", "{config}", "search.trails=3"], "did you mean 'trials'"),
    ],
)
def test_a_mistake_costs_no_container(config, words, told):
    """What the program itself would refuse, or a job cannot do, is refused before anything is made."""
    with pytest.raises(ConfigError, match=told):
        check_command(ROOT, [word.format(config=config) for word in words])


@pytest.mark.parametrize(
    "words",
    [["train", "--sed", "3"], ["train", "--seed", "x"], ["generate"], ["prompts", "nonsense"],
     ["prompts", "diffusiondb", "--bogus"]],
)  # fmt: skip
def test_usage_is_checked_too(words):
    """Unknown options, values of a wrong kind and missing ones are told by the program's own parser."""
    with pytest.raises(typer.TyperException):
        check_command(ROOT, words)


def test_environment_is_given_or_taken(monkeypatch):
    """NAME=VALUE, or NAME of this process; as many threads as cores, unless said otherwise."""
    monkeypatch.setenv("HF_TOKEN", "t")
    assert environment(["HF_TOKEN", "A=b=c"], 2.5) == {"OMP_NUM_THREADS": "2", "HF_TOKEN": "t", "A": "b=c"}
    assert environment(["OMP_NUM_THREADS=1"], 4)["OMP_NUM_THREADS"] == "1"
    for wrong in ("=x", "NOT_SET_HERE"):
        with pytest.raises(ConfigError, match="--env"):
            environment([wrong], None)


def test_mounts_are_paths_or_volumes(tmp_path, monkeypatch):
    """A path must be there, since the engine would make a folder of root's; a volume needs none."""
    given = [f"{tmp_path}:/data:ro", f"{tmp_path}:/again", "cache:/cache"]
    assert mounts(given) == [f"{tmp_path}:/data:ro", f"{tmp_path}:/again:rw", "cache:/cache:rw"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.csv").touch()
    assert mounts(["./prompts.csv:/data"]) == [f"{tmp_path}/prompts.csv:/data:rw"]
    for wrong, told in {
        "prompts.csv:/data": "write ./prompts.csv:/data for the path",
        "./nowhere:/data": "does not exist",
        "data": "write HOST",
        "a:data": "write HOST",
        "a:/b:rx": "write HOST",
    }.items():
        with pytest.raises(ConfigError, match=told):
            mounts([wrong])


def test_limits_in_the_engine_s_units():
    """Cores, bytes and GPUs; swap is no way around the memory."""
    options = Limits("device=1,3", 1.5, "2g").options()
    assert options["nano_cpus"] == 1_500_000_000
    assert options["mem_limit"] == options["memswap_limit"] == 2 * 2**30
    assert options["device_requests"][0]["DeviceIDs"] == ["1", "3"]
    assert Limits("all").options()["device_requests"][0]["Count"] == -1
    assert Limits("2").options()["device_requests"][0]["Count"] == 2


@pytest.mark.parametrize(
    "limits", [Limits(memory="much"), Limits(gpus="0"), Limits(gpus="device="), Limits(shared_memory="x")]
)
def test_a_limit_that_is_none_is_told(limits):
    """With the option's name and what it may be."""
    with pytest.raises(ConfigError, match=r"--(memory|gpus|shm-size)"):
        limits.options()


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("write /var/lib/docker/x: no space left on device", "the disk is full"),
        ('could not select device driver "" with capabilities: [[gpu]]', "leave --gpus out"),
        ("nvidia-container-cli: device error: 7: unknown device: unknown", "nvidia-smi -L"),
        ("Range of CPUs is from 0.01 to 2.00, as there are only 2 CPUs available", "--cpus"),
        ("Minimum memory limit allowed is 6MB", "--memory"),
        ('Conflict. The container name "/a" is already in use by container "0"', "another --name"),
        ("network lab_default not found", "docker compose up -d reward"),
        ("something new", "the container engine says: something new"),
    ],
)
def test_the_engine_s_errors_become_one_line(said, told):
    """What it means and what helps, with what the engine said."""
    line = meaning(APIError("500 Server Error", explanation=said))
    assert told in line
    assert said.split(":")[0] in line
    assert "\n" not in line


def test_a_missing_image_says_how_to_make_it():
    """The first thing that a new user meets."""
    assert "docker compose build" in meaning(ImageNotFound("404", explanation="No such image: x:latest"))


@pytest.mark.parametrize("words", [["list"], ["wait"], ["submit", "train"], ["stop", "x"]])
@pytest.mark.parametrize("address", ["unix:///nonexistent/docker.sock", "tcp://127.0.0.1:9"])
def test_without_an_engine_every_command_says_so(address, words):
    """One line with a remedy, exit code 2."""
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "jobs", *words],
        env=os.environ | {"DOCKER_HOST": address},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "no container engine answers" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_user_who_may_not_is_told_of_the_group(monkeypatch):
    """Permission denied is the second thing that a new user meets."""

    def refused(**_):
        raise DockerException(
            "Error while fetching server API version: PermissionError(13, 'Permission denied')"
        )

    monkeypatch.setattr("docker.from_env", refused)
    with pytest.raises(ContainerError, match="group docker"), engine():
        pass


def test_an_engine_that_goes_away_is_told(monkeypatch):
    """In the midst of a command too."""
    monkeypatch.setattr("docker.from_env", lambda **_: SimpleNamespace(close=lambda: None))
    with pytest.raises(ContainerError, match="reset by peer"), engine():
        raise Refused("Connection reset by peer")


def test_a_narrow_terminal_shows_every_job(capsys):
    """Name, state and times are whole; the command gets what is left."""
    moment = "2026-11-23 03:04:05"
    long = Job("a-rather-long-name", "guard tripped", 3, "train " + "--set x=1 " * 50, moment, moment)
    Console(width=80).print(table([long]))
    shown = capsys.readouterr().out
    assert "a-rather-long-name │ guard tripped │ 11-23 03:04 │ 11-23 03:04 │ train" in shown
    assert max(map(len, shown.splitlines())) == 80


# ------------------------------------------------------------------------------------------- an engine's part


class FakeContainer:
    """A scorer's container that makes keys; or a job's, which may not start."""

    def __init__(self, name, labels=(), networks=("lab_default",), state=None, fails=None):
        self.name, self.labels, self.fails = name, dict(labels), fails
        self.attrs = {
            "NetworkSettings": {"Networks": dict.fromkeys(networks)},
            "Mounts": [{"Destination": "/models", "Name": "lab_models", "Source": "/var/x"}],
            "State": state or {"Status": "running", "ExitCode": 0, "OOMKilled": False},
        }
        self.ran, self.removed, self.started = [], False, 0

    def exec_run(self, command, demux):
        self.ran.append(command)
        return 0, (b"rk_secret\n", b"")

    def start(self):
        if self.fails:
            raise self.fails
        self.started += 1

    def remove(self, force=False):
        self.removed = True


class FakeEngine:
    """What `submit` asks of an engine."""

    def __init__(self, scorers=(), made=None):
        self.images = SimpleNamespace(get=lambda name: None)
        self.scorers, self.made, self.options = list(scorers), made, None
        self.containers = SimpleNamespace(list=self.list, create=self.create, get=self.get)

    def list(self, filters, **_):
        if filters["label"].endswith("role=scorer"):
            return self.scorers
        return [self.made] if self.options and "submission=" in filters["label"] and self.made else []

    def get(self, name):
        return next(container for container in self.scorers if container.name == name)

    def create(self, image, **options):
        self.options = options
        if self.made is None:
            raise APIError(
                "409", explanation='Conflict. The container name "/a" is already in use by container "0"'
            )
        return self.made


def scorer():
    return FakeContainer("lab_reward_1", {KEYS: "/keys/keys.yaml"})


def wanted(tmp_path, name="a", **more):
    return Submission(name, check_command(ROOT, ["train"]), tmp_path, **more)


def test_a_job_is_locked_and_its_key_is_a_file(tmp_path):
    """No root, no capability, no writable file system; the key is in no place that `docker inspect` shows."""
    service, job = scorer(), FakeContainer("job")
    client = FakeEngine([service], job)
    submit(client, wanted(tmp_path))
    options = client.options
    assert options["user"].partition(":")[0] not in ("", "0")
    assert options["read_only"]
    assert options["cap_drop"] == ["ALL"]
    assert "cap_add" not in options
    assert options["security_opt"] == ["no-new-privileges:true"]
    assert "rk_secret" not in str(options)
    key = tmp_path / ".jobs/a/key"
    assert key.read_text() == "rk_secret\n"
    assert key.stat().st_mode & 0o777 == 0o600
    assert f"{key}:/run/secrets/reward_key:ro" in options["volumes"]
    assert options["network"] == "lab_default"
    assert "lab_models:/models:rw" in options["volumes"]
    assert [words[2:4] for words in service.ran] == [["remove", "job-a"], ["new", "job-a"]]
    assert job.started == 1


def test_a_job_that_does_not_start_leaves_nothing(tmp_path):
    """Its container, its key at the scorer, its key file and its empty folder are gone."""
    service = scorer()
    job = FakeContainer("job", fails=APIError("500", explanation="could not select device driver"))
    with pytest.raises(APIError):
        submit(FakeEngine([service], job), wanted(tmp_path))
    assert job.removed
    assert service.ran[-1][:4] == ["reward-service", "keys", "remove", "job-a"]
    assert not (tmp_path / ".jobs/a").exists()
    assert not (tmp_path / "a").exists()


def test_whoever_comes_second_leaves_the_first_alone(tmp_path):
    """Two of one name at a time: the engine takes one of them; its key and its folder stay."""
    service = scorer()
    submit(FakeEngine([service], FakeContainer("job")), wanted(tmp_path))
    with pytest.raises(APIError):
        submit(FakeEngine([service]), wanted(tmp_path))
    assert [words[2] for words in service.ran] == ["remove", "new"]
    assert (tmp_path / ".jobs/a/key").exists()
    assert (tmp_path / "a").exists()


def test_a_run_that_is_there_is_not_gone_on_with_by_mistake(tmp_path):
    """A new job of an old run's name is refused; going on with it has to be said."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/splits.json").write_text("")
    for command in (["train"], ["crossval"]):
        with pytest.raises(ContainerError, match="--go-on"):
            submit(
                FakeEngine([scorer()], FakeContainer("job")),
                Submission("a", check_command(ROOT, command), tmp_path),
            )
    client = FakeEngine([scorer()], FakeContainer("job"))
    submit(client, wanted(tmp_path, go_on=True))
    assert "--resume" in " ".join(client.options["entrypoint"])
    client = FakeEngine([scorer()], FakeContainer("job"))
    submit(client, Submission("a", check_command(ROOT, ["train", "--resume"]), tmp_path))
    assert "entrypoint" not in client.options
    assert client.options["command"][-1] == "--resume"


def test_a_link_is_not_followed(tmp_path):
    """Whoever may write below RUNS could lead root's hand elsewhere."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/a").symlink_to(tmp_path / "elsewhere")
    job = FakeContainer("job")
    with pytest.raises(ConfigError, match="is a link"):
        submit(FakeEngine([scorer()], job), wanted(tmp_path / "runs"))
    assert job.removed
    assert (tmp_path / "runs/a").is_symlink()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"two\nlines\n", None])
def test_a_key_file_has_to_hold_a_key(tmp_path, content):
    """Missing, empty, of several lines, or no text: told at once, not by a job's 401."""
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="one line, the key"):
        read_key(path)


@pytest.mark.parametrize("cpus", [math.inf, math.nan, 0.0, -1.0, 1e12])
def test_cores_are_a_number_of_them(cpus):
    """What the engine could not be told."""
    with pytest.raises(ConfigError, match="--cpus"):
        cores(cpus)


def test_a_name_that_reads_as_a_number_stays_a_name():
    """`--set name=7` would be the number."""
    assert 'name="7"' in check_command(ROOT, ["train"]).inside("7", SHARED)


def test_a_name_with_brackets_in_its_command_is_listed(capsys):
    """A prompt may look like markup."""
    Console(width=120).print(table([Job("a", "done", 0, "generate --prompt '[/b] a [red] cat'", "", "")]))
    assert "[/b] a [red] cat" in capsys.readouterr().out


def test_waiting_goes_on_for_a_job_that_goes_on(monkeypatch):
    """One that was stopped and resumed meanwhile, and one that was removed, do not end it early."""
    seen = iter(
        [
            {"a": None, "b": None, "c": None},
            {"a": 143, "b": None, "c": None},
            {"a": None, "b": 0},
            {"a": 0, "b": 0},
        ]
    )
    now = {}

    def look(client, names=()):
        now.update({"jobs": next(seen, now.get("jobs"))})
        return [Job(name, "state", code, "", "", "") for name, code in now["jobs"].items()]

    monkeypatch.setattr("trainer.jobs.wait.jobs", look)
    monkeypatch.setattr("trainer.jobs.wait._last_line", lambda *_: "")
    monkeypatch.setattr("trainer.jobs.wait._bring_back", lambda *_: None)
    monkeypatch.setattr("trainer.jobs.wait._LOOK_EVERY_S", 0)
    said = []
    found = wait(None, [], said.append)
    assert {job.name: job.exit_code for job in found} == {"a": 0, "b": 0}
    assert said == ["a: state", "b: state", "a: state"]


@pytest.mark.parametrize("name", ["", "A", "a/b", "-a", "a" * 41, "ä"])
def test_a_name_that_is_no_name_is_refused(tmp_path, name):
    """It becomes a container's, a folder's, a key's and a client's name."""
    with pytest.raises(ConfigError, match="--name"):
        submit(FakeEngine([scorer()]), wanted(tmp_path, name))


def test_the_scorer_is_the_only_one_or_has_to_be_named():
    """None, one that is not there, and several: one line each."""
    one, two = scorer(), FakeContainer("other")
    assert find_scorer(FakeEngine([one]), None) is one
    assert find_scorer(FakeEngine([one, two]), "other") is two
    for client, name, told in (
        (FakeEngine(), None, "docker compose up -d reward"),
        (FakeEngine([one]), "x", "'x'"),
        (FakeEngine([one, two]), None, "--scorer: lab_reward_1, other"),
    ):
        with pytest.raises(ContainerError, match=told):
            find_scorer(client, name)


ENDED = {"Status": "exited", "ExitCode": 0, "OOMKilled": False, "Running": False}
RUNS = {**ENDED, "Status": "running", "Running": True}


@pytest.mark.parametrize(
    ("job", "judge", "said"),
    [
        (RUNS, {**ENDED, "ExitCode": 137}, ["was ended by force; it has been started again"]),
        (RUNS, ENDED, ["does not run, and jobs wait for it; start it: docker compose up -d reward"]),
        (RUNS, RUNS, []),
        (ENDED, {**ENDED, "ExitCode": 137}, []),
    ],
)
def test_a_scorer_that_is_down_while_jobs_wait_for_it(job, service, said):
    """`docker kill` is mended, an orderly stop is told of; nobody misses the scorer of jobs that ended."""
    service = FakeContainer("lab_reward_1", {KEYS: "/keys/keys.yaml"}, state=dict(service))
    job = FakeContainer("job", {JOB: "a", SCORER: service.name}, state=job)
    client, lines = FakeEngine([service]), []
    client.containers.list = lambda *, filters, **more: [
        it
        for it in ([job] if filters["label"].endswith("role=job") else [service])
        if it is job or it.started or it.attrs["State"]["Status"] == "running"
    ]
    mend(client, lines.append)
    assert [line.removeprefix("lab_reward_1 ") for line in lines] == said


def test_a_scorer_on_the_default_bridge_cannot_be_found_by_name():
    """Docker's own bridge knows no names."""
    with pytest.raises(ContainerError, match="no network of its own"):
        network_of(FakeContainer("x", networks=("bridge",)))


@pytest.mark.parametrize(
    ("status", "code", "out_of_memory", "started"),
    [("exited", 137, False, 1), ("exited", 137, True, 0), ("exited", 0, False, 0), ("running", 0, False, 0),
     ("restarting", 137, False, 0)],
)  # fmt: skip
def test_only_a_scorer_ended_by_force_is_started_again(status, code, out_of_memory, started):
    """An orderly stop is somebody's wish, and what does not fit into memory would not fit again."""
    state = {"Status": status, "ExitCode": code, "OOMKilled": out_of_memory}
    service = FakeContainer("s", state=state)
    assert revive(FakeEngine([service]), "s") is bool(started)
    assert service.started == started
