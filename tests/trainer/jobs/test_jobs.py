"""Trainer jobs: command lines, limits, submission, keys, waiting, errors of the container engine."""

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import typer
from docker.errors import APIError, DockerException, ImageNotFound
from requests.exceptions import ConnectionError as ConnectionRefused
from rich.console import Console

from trainer.cli.jobs import table
from trainer.cli.main import app
from trainer.config import ConfigError
from trainer.jobs.docker import KEYS, engine, error_message, find_scorer, network_of, restart_if_killed
from trainer.jobs.jobs import JOB, SCORER, Job, Limits, Submission, read_key, submit
from trainer.jobs.submit import ServiceAccess, check_command, check_cpus, environment, mounts
from trainer.jobs.wait import restart_killed_scorers, wait
from trainer.runtime.errors import ContainerError

ROOT = typer.main.get_command(app)
SHARED = ServiceAccess("http://reward:8000", with_key=True)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("trainer: {prompts: {train: p.txt}, karlo: {path: m}, objective: {weights: {clip: 1}}}\n")
    return path


def test_user_settings_override_settings_of_the_job(config):
    """The user's settings come last; the configuration's path is that in the container."""
    checked = check_command(ROOT, ["train", "--config", str(config), "--set", "service.retry_budget_s=5"])
    words = checked.in_container("mine", SHARED)
    assert words[:3] == ["train", "--run", "/runs/mine"]
    assert words[-4:] == ["--config", "/app/configs/mine.yaml", "--set", "service.retry_budget_s=5"]
    assert words.index("service.retry_budget_s=600") < len(words) - 1
    assert {'service.url="http://reward:8000"', 'service.client_id="mine"'} <= set(words)
    assert 'service.api_key_file="/run/secrets/reward_key"' in words
    assert checked.config == config
    assert checked.resumable


@pytest.mark.parametrize("form", [["--config={}"], ["--config", "{}"]])
def test_both_forms_of_the_config_option_are_translated(config, form):
    """`--config=FILE` is the same as `--config FILE`."""
    words = check_command(ROOT, ["crossval", *(part.format(config) for part in form)]).in_container(
        "x", SHARED
    )
    assert str(config) not in " ".join(words)
    assert "/app/configs/mine.yaml" in " ".join(words)


def test_command_without_key_has_no_key_file():
    """A scorer that needs no keys is used without one."""
    words = check_command(ROOT, ["train"]).in_container("x", ServiceAccess("http://x", with_key=False))
    assert not [word for word in words if "api_key_file" in word]


def test_command_without_config_gets_no_settings():
    """The command `report` has no settings, and needs no scorer."""
    assert check_command(ROOT, ["report", "/runs/a"]).in_container("x", SHARED) == ["report", "/runs/a"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no command to run"),
        (["trian"], "not a command of reward-trainer for jobs; use one of crossval, generate"),
        (["fold", "0"], "not a command"),
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
def test_invalid_command_is_refused_before_a_container_is_created(config, words, message):
    """The message is that of the program itself, or the reason why it cannot be a job."""
    with pytest.raises(ConfigError, match=message):
        check_command(ROOT, [word.format(config=config) for word in words])


@pytest.mark.parametrize(
    "words",
    [["train", "--sed", "3"], ["train", "--seed", "x"], ["generate"], ["prompts", "nonsense"],
     ["prompts", "diffusiondb", "--bogus"]],
)  # fmt: skip
def test_invalid_usage_is_refused_by_the_programs_parser(words):
    """Unknown options, values of a wrong type and missing values are errors."""
    with pytest.raises(typer.TyperException):
        check_command(ROOT, words)


def test_environment_takes_values_or_variables_of_this_process(monkeypatch):
    """There are as many threads as cores unless a value is given."""
    monkeypatch.setenv("HF_TOKEN", "t")
    assert environment(["HF_TOKEN", "A=b=c"], 2.5) == {"OMP_NUM_THREADS": "2", "HF_TOKEN": "t", "A": "b=c"}
    assert environment(["OMP_NUM_THREADS=1"], 4)["OMP_NUM_THREADS"] == "1"
    for wrong in ("=x", "NOT_SET_HERE"):
        with pytest.raises(ConfigError, match="--env"):
            environment([wrong], None)


def test_mounts_are_paths_or_volumes(tmp_path, monkeypatch):
    """A path must exist, because the engine would create a folder owned by root; a volume need not."""
    values = [f"{tmp_path}:/data:ro", f"{tmp_path}:/again", "cache:/cache"]
    assert mounts(values) == [f"{tmp_path}:/data:ro", f"{tmp_path}:/again:rw", "cache:/cache:rw"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.csv").touch()
    assert mounts(["./prompts.csv:/data"]) == [f"{tmp_path}/prompts.csv:/data:rw"]
    for wrong, message in {
        "prompts.csv:/data": "use ./prompts.csv:/data for the path",
        "./nowhere:/data": "does not exist",
        "data": "use HOST",
        "a:data": "use HOST",
        "a:/b:rx": "use HOST",
    }.items():
        with pytest.raises(ConfigError, match=message):
            mounts([wrong])


def test_limits_become_options_of_the_engine():
    """Cores, bytes and GPUs are in the engine's units; memory includes swap."""
    options = Limits("device=1,3", 1.5, "2g").options()
    assert options["nano_cpus"] == 1_500_000_000
    assert options["mem_limit"] == options["memswap_limit"] == 2 * 2**30
    assert options["device_requests"][0]["DeviceIDs"] == ["1", "3"]
    assert Limits("all").options()["device_requests"][0]["Count"] == -1
    assert Limits("2").options()["device_requests"][0]["Count"] == 2


@pytest.mark.parametrize(
    "limits", [Limits(memory="much"), Limits(gpus="0"), Limits(gpus="device="), Limits(shared_memory="x")]
)
def test_invalid_limit_raises_config_error(limits):
    """The message names the option."""
    with pytest.raises(ConfigError, match=r"--(memory|gpus|shm-size)"):
        limits.options()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("write /var/lib/docker/x: no space left on device", "the disk is full"),
        ('could not select device driver "" with capabilities: [[gpu]]', "leave --gpus out"),
        ("nvidia-container-cli: device error: 7: unknown device: unknown", "nvidia-smi -L"),
        ("Range of CPUs is from 0.01 to 2.00, as there are only 2 CPUs available", "--cpus"),
        ("Minimum memory limit allowed is 6MB", "--memory"),
        ('Conflict. The container name "/a" is already in use by container "0"', "another --name"),
        ("network lab_default not found", "docker compose up -d reward"),
        ("something new", "error of the container engine: something new"),
    ],
)
def test_error_of_the_engine_becomes_one_line(error, message):
    """The line has the cause or the remedy, and the engine's own message."""
    line = error_message(APIError("500 Server Error", explanation=error))
    assert message in line
    assert error.split(":")[0] in line
    assert "\n" not in line


def test_missing_image_error_names_the_build_command():
    """A new user's first error."""
    assert "docker compose build" in error_message(
        ImageNotFound("404", explanation="No such image: x:latest")
    )


@pytest.mark.parametrize("words", [["list"], ["wait"], ["submit", "train"], ["stop", "x"]])
@pytest.mark.parametrize("address", ["unix:///nonexistent/docker.sock", "tcp://127.0.0.1:9"])
def test_commands_without_an_engine_print_one_line(address, words):
    """The exit code is 2."""
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "jobs", *words],
        env=os.environ | {"DOCKER_HOST": address},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "cannot connect to a container engine" in done.stderr
    assert done.stderr.count("\n") == 1


def test_permission_error_names_the_group(monkeypatch):
    """A new user's second error."""

    def refused(**_):
        raise DockerException(
            "Error while fetching server API version: PermissionError(13, 'Permission denied')"
        )

    monkeypatch.setattr("docker.from_env", refused)
    with pytest.raises(ContainerError, match="group docker"), engine():
        pass


def test_lost_connection_to_the_engine_raises_container_error(monkeypatch):
    """The connection may be lost in the middle of a command."""
    monkeypatch.setattr("docker.from_env", lambda **_: SimpleNamespace(close=lambda: None))
    with pytest.raises(ContainerError, match="reset by peer"), engine():
        raise ConnectionRefused("Connection reset by peer")


def test_table_of_jobs_fits_a_narrow_terminal(capsys):
    """Name, state and times are complete; the command gets the remaining width."""
    moment = "2026-11-23 03:04:05"
    long = Job("a-rather-long-name", "guard tripped", 3, "train " + "--set x=1 " * 50, moment, moment)
    Console(width=80).print(table([long]))
    shown = capsys.readouterr().out
    assert "a-rather-long-name │ guard tripped │ 11-23 03:04 │ 11-23 03:04 │ train" in shown
    assert max(map(len, shown.splitlines())) == 80


# ------------------------------------------------------------------------------------------- submission


class FakeContainer:
    """A scorer that creates API keys, or a job that may fail to start."""

    def __init__(self, name, labels=(), networks=("lab_default",), state=None, fails=None):
        self.name, self.labels, self.fails = name, dict(labels), fails
        self.attrs = {
            "NetworkSettings": {"Networks": dict.fromkeys(networks)},
            "Mounts": [{"Destination": "/models", "Name": "lab_models", "Source": "/var/x"}],
            "State": state or {"Status": "running", "ExitCode": 0, "OOMKilled": False},
        }
        self.commands, self.removed, self.started = [], False, 0

    def exec_run(self, command, demux):
        self.commands.append(command)
        return 0, (b"rk_secret\n", b"")

    def start(self):
        if self.fails:
            raise self.fails
        self.started += 1

    def remove(self, force=False):
        self.removed = True


class FakeEngine:
    """The part of an engine that `submit` uses."""

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


def submission(tmp_path, name="a", **more):
    return Submission(name, check_command(ROOT, ["train"]), tmp_path, **more)


def test_job_has_no_privileges_and_its_key_is_a_file(tmp_path):
    """No root, no capabilities, a read-only file system; `docker inspect` does not show the key."""
    service, job = scorer(), FakeContainer("job")
    client = FakeEngine([service], job)
    submit(client, submission(tmp_path))
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
    assert [words[2:4] for words in service.commands] == [["remove", "job-a"], ["new", "job-a"]]
    assert job.started == 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, "corp.example"), ({"NO_PROXY": "mine"}, "mine"), ({"no_proxy": "mine"}, "mine")],
)
def test_job_reaches_its_scorer_without_a_proxy(tmp_path, monkeypatch, given, expected):
    """The engine's client configuration gives each container a proxy; its hosts without one are kept."""
    (tmp_path / "config.json").write_text(
        json.dumps({"proxies": {"default": {"httpProxy": "http://squid:3128", "noProxy": "corp.example"}}})
    )
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    client = FakeEngine([scorer()], FakeContainer("job"))
    submit(client, submission(tmp_path, environment=given))
    environment = client.options["environment"]
    assert environment["NO_PROXY"] == environment["no_proxy"]
    assert environment["NO_PROXY"].split(",") == ["lab_reward_1", "localhost", "127.0.0.1", "::1", expected]


def test_job_of_a_service_elsewhere_keeps_its_proxies(tmp_path, monkeypatch):
    """Unless it joins the service's network, where the service is reached by its name."""
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    client = FakeEngine([], FakeContainer("job"))
    submit(client, submission(tmp_path, url="http://far.example:8000"))
    assert client.options["environment"] == {}
    client = FakeEngine([], FakeContainer("job"))
    submit(client, submission(tmp_path, "b", url="http://near:8000", network="lab"))
    assert client.options["environment"]["NO_PROXY"] == "near,localhost,127.0.0.1,::1"


def test_job_that_fails_to_start_is_cleaned_up(tmp_path):
    """Container, key at the scorer, key file and empty folder are removed."""
    service = scorer()
    job = FakeContainer("job", fails=APIError("500", explanation="could not select device driver"))
    with pytest.raises(APIError):
        submit(FakeEngine([service], job), submission(tmp_path))
    assert job.removed
    assert service.commands[-1][:4] == ["reward-service", "keys", "remove", "job-a"]
    assert not (tmp_path / ".jobs/a").exists()
    assert not (tmp_path / "a").exists()


def test_second_submission_of_a_name_keeps_the_first_job(tmp_path):
    """The engine accepts one of two simultaneous jobs; its key and its folder stay."""
    service = scorer()
    submit(FakeEngine([service], FakeContainer("job")), submission(tmp_path))
    with pytest.raises(APIError):
        submit(FakeEngine([service]), submission(tmp_path))
    assert [words[2] for words in service.commands] == ["remove", "new"]
    assert (tmp_path / ".jobs/a/key").exists()
    assert (tmp_path / "a").exists()


def test_existing_run_is_resumed_only_on_request(tmp_path):
    """A new job with the name of an old run is refused without `--go-on` or `--resume`."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/splits.json").write_text("")
    for command in (["train"], ["crossval"]):
        with pytest.raises(ContainerError, match="--go-on"):
            submit(
                FakeEngine([scorer()], FakeContainer("job")),
                Submission("a", check_command(ROOT, command), tmp_path),
            )
    client = FakeEngine([scorer()], FakeContainer("job"))
    submit(client, submission(tmp_path, go_on=True))
    assert "--resume" in " ".join(client.options["entrypoint"])
    client = FakeEngine([scorer()], FakeContainer("job"))
    submit(client, Submission("a", check_command(ROOT, ["train", "--resume"]), tmp_path))
    assert "entrypoint" not in client.options
    assert client.options["command"][-1] == "--resume"


def test_symbolic_link_in_runs_is_refused(tmp_path):
    """A user who can write to RUNS could otherwise make root write elsewhere."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/a").symlink_to(tmp_path / "elsewhere")
    job = FakeContainer("job")
    with pytest.raises(ConfigError, match="is a symbolic link"):
        submit(FakeEngine([scorer()], job), submission(tmp_path / "runs"))
    assert job.removed
    assert (tmp_path / "runs/a").is_symlink()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"two\nlines\n", None])
def test_invalid_key_file_raises_config_error(tmp_path, content):
    """Missing, empty, several lines or not text: refused at once, not by a 401 of the job."""
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="one line, the key"):
        read_key(path)


@pytest.mark.parametrize("cpus", [math.inf, math.nan, 0.0, -1.0, 1e12])
def test_invalid_number_of_cpus_raises_config_error(cpus):
    """Values that the engine cannot represent are refused."""
    with pytest.raises(ConfigError, match="--cpus"):
        check_cpus(cpus)


def test_numeric_name_stays_a_string():
    """`--set name=7` would be the number."""
    assert 'name="7"' in check_command(ROOT, ["train"]).in_container("7", SHARED)


def test_table_of_jobs_prints_brackets_of_a_command(capsys):
    """A prompt may look like Rich markup."""
    Console(width=120).print(table([Job("a", "done", 0, "generate --prompt '[/b] a [red] cat'", "", "")]))
    assert "[/b] a [red] cat" in capsys.readouterr().out


def test_wait_continues_for_a_job_that_is_resumed(monkeypatch):
    """A job that is stopped and resumed, and one that is removed, do not end the wait early."""
    seen = iter(
        [
            {"a": None, "b": None, "c": None},
            {"a": 143, "b": None, "c": None},
            {"a": None, "b": 0},
            {"a": 0, "b": 0},
        ]
    )
    now = {}

    def list_jobs(client, names=()):
        now.update({"jobs": next(seen, now.get("jobs"))})
        return [Job(name, "state", code, "", "", "") for name, code in now["jobs"].items()]

    monkeypatch.setattr("trainer.jobs.wait.jobs", list_jobs)
    monkeypatch.setattr("trainer.jobs.wait._last_line", lambda *_: "")
    monkeypatch.setattr("trainer.jobs.wait._restart_scorers", lambda *_: None)
    monkeypatch.setattr("trainer.jobs.wait._POLL_S", 0)
    lines = []
    ended = wait(None, [], lines.append)
    assert {job.name: job.exit_code for job in ended} == {"a": 0, "b": 0}
    assert lines == ["a: state", "b: state", "a: state"]


@pytest.mark.parametrize("name", ["", "A", "a/b", "-a", "a" * 41, "ä"])
def test_invalid_name_raises_config_error(tmp_path, name):
    """It becomes the name of a container, a folder, a key and a client."""
    with pytest.raises(ConfigError, match="--name"):
        submit(FakeEngine([scorer()]), submission(tmp_path, name))


def test_find_scorer_returns_the_named_or_only_one():
    """No scorer, an unknown name and several scorers are errors of one line."""
    one, two = scorer(), FakeContainer("other")
    assert find_scorer(FakeEngine([one]), None) is one
    assert find_scorer(FakeEngine([one, two]), "other") is two
    for client, name, message in (
        (FakeEngine(), None, "docker compose up -d reward"),
        (FakeEngine([one]), "x", "'x'"),
        (FakeEngine([one, two]), None, "--scorer: lab_reward_1, other"),
    ):
        with pytest.raises(ContainerError, match=message):
            find_scorer(client, name)


ENDED = {"Status": "exited", "ExitCode": 0, "OOMKilled": False, "Running": False}
RUNS = {**ENDED, "Status": "running", "Running": True}


@pytest.mark.parametrize(
    ("job", "service", "reported"),
    [
        (RUNS, {**ENDED, "ExitCode": 137}, ["was killed; it has been restarted"]),
        (RUNS, ENDED, ["is not running, and jobs wait for it; start it: docker compose up -d reward"]),
        (RUNS, RUNS, []),
        (ENDED, {**ENDED, "ExitCode": 137}, []),
    ],
)
def test_killed_scorer_of_running_jobs_is_restarted(job, service, reported):
    """A scorer that was stopped in order is reported; that of ended jobs is ignored."""
    service = FakeContainer("lab_reward_1", {KEYS: "/keys/keys.yaml"}, state=dict(service))
    job = FakeContainer("job", {JOB: "a", SCORER: service.name}, state=job)
    client, lines = FakeEngine([service]), []
    client.containers.list = lambda *, filters, **more: [
        it
        for it in ([job] if filters["label"].endswith("role=job") else [service])
        if it is job or it.started or it.attrs["State"]["Status"] == "running"
    ]
    restart_killed_scorers(client, lines.append)
    assert [line.removeprefix("lab_reward_1 ") for line in lines] == reported


def test_scorer_on_the_default_bridge_raises_container_error():
    """Docker's default bridge does not resolve names."""
    with pytest.raises(ContainerError, match="no network that resolves names"):
        network_of(FakeContainer("x", networks=("bridge",)))


@pytest.mark.parametrize(
    ("status", "code", "out_of_memory", "started"),
    [("exited", 137, False, 1), ("exited", 137, True, 0), ("exited", 0, False, 0), ("running", 0, False, 0),
     ("restarting", 137, False, 0)],
)  # fmt: skip
def test_only_a_killed_scorer_is_restarted(status, code, out_of_memory, started):
    """Not one that was stopped in order, and not one that ran out of memory: it would do so again."""
    state = {"Status": status, "ExitCode": code, "OOMKilled": out_of_memory}
    service = FakeContainer("s", state=state)
    assert restart_if_killed(FakeEngine([service]), "s") is bool(started)
    assert service.started == started
