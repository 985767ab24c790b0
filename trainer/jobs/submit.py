"""Check a job's command line and options, and translate them for the container."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import ConfigError, command_overrides, load_experiment_config, load_trainer_config

RUNS = "/runs"
SECRET = "/run/secrets/reward_key"
CONFIGS = "/app/configs"

# Timeout of requests to the scorer: after a restart, it must load its models.
SCORER_TIMEOUT_S = 600

# Commands that cannot be jobs, besides hidden ones, which other commands start.
_NOT_A_JOB = {
    "demo": "it starts a reward service of its own; submit `train`, which uses the shared one",
    "jobs": "a job cannot submit jobs",
}


@dataclass(frozen=True)
class ServiceAccess:
    """Access of a job to the reward service."""

    url: str  # as the job's container reaches it
    with_key: bool  # True if the job has an API key


@dataclass(frozen=True)
class Command:
    """A checked command line of the trainer."""

    words: tuple[str, ...]  # as the user wrote them
    config: Path | None = None  # configuration file on this machine, if one is named
    uses_service: bool = False  # requests scores, and so accepts settings
    has_folder: bool = False  # writes a run or an experiment
    resumable: bool = False  # resumes if `--resume` is appended
    resumes: bool = False  # has `--resume` already

    def in_container(self, name: str, access: ServiceAccess) -> list[str]:
        """Return the command line for the container.

        The job's folder and service come first, so that the user's own options override them.
        """
        first, *rest = self.words
        folder = ["--run", f"{RUNS}/{name}"] if self.has_folder else []
        return [
            first,
            *folder,
            *(self._settings(name, access) if self.uses_service else []),
            *self._with_config(rest),
        ]

    def _settings(self, name: str, access: ServiceAccess) -> list[str]:
        settings = {
            "name": name,
            "runs_dir": RUNS,
            "service.url": access.url,
            "service.client_id": name,
            "service.ready_timeout_s": SCORER_TIMEOUT_S,
            "service.retry_budget_s": SCORER_TIMEOUT_S,
        }
        if access.with_key:
            settings["service.api_key_file"] = SECRET
        # As JSON, which is valid YAML: a name such as 7 stays a string.
        return [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]

    def _with_config(self, words: Sequence[str]) -> list[str]:
        """Return the words with the configuration's path in the container."""
        if self.config is None:
            return list(words)
        result, mounted = list(words), f"{CONFIGS}/{self.config.name}"
        for i, word in enumerate(result):
            if word == "--config":
                result[i + 1] = mounted
            elif word.startswith("--config="):
                result[i] = f"--config={mounted}"
        return result


def check_command(root: Any, words: Sequence[str]) -> Command:
    """Check a command line as the program itself would.

    Args:
        root: The program's click command.
        words: The command line.

    Raises:
        ConfigError: The command cannot be a job, or its configuration is invalid.
        TyperException: The command line is invalid.
    """
    if not words:
        raise ConfigError(
            "no command to run; end the line with one: -- train --config configs/miniature.yaml"
        )
    name, *rest = words
    command = getattr(root, "commands", {}).get(name)
    if command is None or command.hidden:
        known = sorted(key for key, it in root.commands.items() if not it.hidden and key not in _NOT_A_JOB)
        raise ConfigError(
            f"{name!r} is not a command of reward-trainer for jobs; use one of {', '.join(known)}"
        )
    if name in _NOT_A_JOB:
        raise ConfigError(f"{name} cannot be a job: {_NOT_A_JOB[name]}")
    if "--help" in rest:
        raise ConfigError(f"--help needs no job; run reward-trainer {name} --help")
    context = command.make_context(name, list(rest))
    if hasattr(command, "commands"):  # a group, which uses no reward service
        subname, inner, arguments = command.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        inner.make_context(subname, arguments, parent=context)
        return Command(tuple(words))
    return _checked(tuple(words), context.params)


def _checked(words: tuple[str, ...], parameters: dict[str, Any]) -> Command:
    if parameters.get("service"):
        raise ConfigError("a job uses the shared reward service; leave --judge out")
    if parameters.get("run"):
        raise ConfigError("the folder of a job is RUNS/NAME; leave --run out")
    config = parameters.get("config") if any(word.split("=")[0] == "--config" for word in words) else None
    if config is not None and not config.is_file():
        raise ConfigError(f"{config}: no such configuration file on this machine; correct --config")
    if config is not None and not parameters.get("resume"):
        load = load_experiment_config if words[0] in ("crossval", "search") else load_trainer_config
        overrides = command_overrides(
            parameters.get("seed"), parameters.get("set_"), parameters.get("overrides")
        )
        load(config, [f"runs_dir={RUNS}", "name=job", *overrides])
    return Command(
        words,
        config.resolve() if config is not None else None,
        uses_service="config" in parameters,
        has_folder="run" in parameters,
        resumable="resume" in parameters and not parameters["resume"],
        resumes=bool(parameters.get("resume")),
    )


def environment(variables: Sequence[str], cpus: float | None) -> dict[str, str]:
    """Return environment variables from `--env`, and a number of threads that fits `--cpus`.

    Args:
        variables: `NAME=VALUE`, or `NAME` for the value in this process.
        cpus: Cores of the job.

    Raises:
        ConfigError: A variable is invalid, or not set here.
    """
    values = {"OMP_NUM_THREADS": str(max(1, int(cpus)))} if cpus else {}
    for pair in variables:
        name, equals, value = pair.partition("=")
        if not name or not (equals or name in os.environ):
            raise ConfigError(f"--env {pair}: use NAME=VALUE, or the NAME of a variable that is set here")
        values[name] = value if equals else os.environ[name]
    return values


def without_proxy(host: str, variables: Mapping[str, str], others: str) -> dict[str, str]:
    """Return the environment of a job that reaches a host directly, whatever proxy the engine gives it.

    Args:
        host: The host.
        variables: The environment so far.
        others: Further hosts, if the environment names none; separated by commas.
    """
    given = variables.get("no_proxy") or variables.get("NO_PROXY") or others
    hosts = ",".join(filter(None, (host, "localhost", "127.0.0.1", "::1", given)))
    # Both cases: lower case prevails in Python, and only that is read by some programs.
    return {**variables, "NO_PROXY": hosts, "no_proxy": hosts}


def check_cpus(cpus: float | None) -> float | None:
    """Return the value of `--cpus`; raise a ConfigError if it is not a number of cores."""
    if cpus is not None and not (math.isfinite(cpus) and 0.01 <= cpus <= 10_000):
        raise ConfigError(f"--cpus {cpus}: use a number of cores, such as 1.5")
    return cpus


def mounts(values: Sequence[str]) -> list[str]:
    """Return the mounts of `--mount` in the engine's form.

    Args:
        values: `HOST:INSIDE[:ro]`, HOST a path or the name of a volume.

    Raises:
        ConfigError: A mount is invalid, or its path does not exist.
    """
    found = []
    for mount in values:
        host, _, rest = mount.partition(":")
        inside, _, mode = rest.partition(":")
        if not host or not inside.startswith("/") or mode not in ("", "ro", "rw"):
            raise ConfigError(f"--mount {mount}: use HOST:/INSIDE or HOST:/INSIDE:ro")
        if "/" in host or host.startswith("."):
            path = Path(host).resolve()
            if not path.exists():
                raise ConfigError(f"--mount {mount}: {host} does not exist; create it, or correct the path")
            host = str(path)
        elif Path(host).exists():
            raise ConfigError(
                f"--mount {mount}: {host} would name a volume, but a path of that name exists; "
                f"use ./{mount} for the path"
            )
        found.append(f"{host}:{inside}:{mode or 'rw'}")
    return found
