"""What a job's command line becomes in its container: checked here, so that a mistake costs no container."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import ConfigError, given, load_experiment_config, load_trainer_config

RUNS = "/runs"
SECRET = "/run/secrets/reward_key"
CONFIGS = "/app/configs"

# A scorer that is restarted may take as long as its models take to load.
PATIENCE_S = 600

# Hidden ones are started by others; the rest have nothing to do with a shared scorer.
_NOT_HERE = {
    "demo": "it starts a reward service of its own; submit `train`, which asks the shared one",
    "jobs": "a job cannot submit jobs",
}


@dataclass(frozen=True)
class Asking:
    """Whom a job asks for scores.

    Args:
        url: as the job's container reaches the scorer
        with_key: whether it has a key
    """

    url: str
    with_key: bool


@dataclass(frozen=True)
class Command:
    """A trainer's command line, checked.

    Args:
        words: as they were given
        config: a configuration on this machine, if one was named
        asks: whether it asks a scorer, and so takes settings
        has_folder: whether it writes a run or an experiment
        resumable: whether the same line goes on with `--resume`
        resumes: whether it says so already
    """

    words: tuple[str, ...]
    config: Path | None = None
    asks: bool = False
    has_folder: bool = False
    resumable: bool = False
    resumes: bool = False

    def inside(self, name: str, asking: Asking) -> list[str]:
        """The words for the container: this job's folder and scorer first, so that what was given wins."""
        first, *rest = self.words
        folder = ["--run", f"{RUNS}/{name}"] if self.has_folder else []
        return [first, *folder, *(self._settings(name, asking) if self.asks else []), *self._mapped(rest)]

    def _settings(self, name: str, asking: Asking) -> list[str]:
        settings = {
            "name": name,
            "runs_dir": RUNS,
            "service.url": asking.url,
            "service.client_id": name,
            "service.ready_timeout_s": PATIENCE_S,
            "service.retry_budget_s": PATIENCE_S,
        }
        if asking.with_key:
            settings["service.api_key_file"] = SECRET
        # As JSON, which is YAML too: 7 is a name.
        return [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]

    def _mapped(self, words: Sequence[str]) -> list[str]:
        """The words with the configuration where the container has it."""
        if self.config is None:
            return list(words)
        found, there = list(words), f"{CONFIGS}/{self.config.name}"
        for at, word in enumerate(found):
            if word == "--config":
                found[at + 1] = there
            elif word.startswith("--config="):
                found[at] = f"--config={there}"
        return found


def check_command(root: Any, words: Sequence[str]) -> Command:
    """Check a command line as the program itself would.

    Args:
        root: the program's own command Raises ConfigError or a usage error.
    """
    if not words:
        raise ConfigError(
            "nothing to run; end the line with a command: -- train --config configs/miniature.yaml"
        )
    name, *rest = words
    command = getattr(root, "commands", {}).get(name)
    if command is None or command.hidden:
        known = sorted(key for key, it in root.commands.items() if not it.hidden and key not in _NOT_HERE)
        raise ConfigError(f"{name!r} is no command of reward-trainer; jobs run {', '.join(known)}")
    if name in _NOT_HERE:
        raise ConfigError(f"{name} is not for a job: {_NOT_HERE[name]}")
    if "--help" in rest:
        raise ConfigError(f"--help needs no job; say reward-trainer {name} --help")
    context = command.make_context(name, list(rest))
    if hasattr(command, "commands"):  # a group, which asks no scorer
        found, inner, arguments = command.resolve_command(context, [*context._protected_args, *context.args])
        inner.make_context(found, arguments, parent=context)
        return Command(tuple(words))
    return _checked(tuple(words), context.params)


def _checked(words: tuple[str, ...], parameters: dict[str, Any]) -> Command:
    if parameters.get("judge"):
        raise ConfigError("a job asks the shared scorer; leave --judge out")
    if parameters.get("run"):
        raise ConfigError("a job's folder has its name, below --runs; leave --run out")
    config = parameters.get("config") if any(word.split("=")[0] == "--config" for word in words) else None
    if config is not None and not config.is_file():
        raise ConfigError(f"{config}: no such configuration on this machine; see --config")
    asks = "config" in parameters
    if config is not None and not parameters.get("resume"):
        load = load_experiment_config if words[0] in ("crossval", "search") else load_trainer_config
        own = given(parameters.get("seed"), parameters.get("set_"), parameters.get("overrides"))
        load(config, [f"runs_dir={RUNS}", "name=job", *own])
    return Command(
        words,
        config.resolve() if config is not None else None,
        asks=asks,
        has_folder="run" in parameters,
        resumable="resume" in parameters and not parameters["resume"],
        resumes=bool(parameters.get("resume")),
    )


def environment(given: Sequence[str], cpus: float | None) -> dict[str, str]:
    """`NAME=VALUE`, or `NAME` for this process's own; threads no more than cores. Raises ConfigError."""
    found = {"OMP_NUM_THREADS": str(max(1, int(cpus)))} if cpus else {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not name or not (equals or name in os.environ):
            raise ConfigError(f"--env {pair}: write NAME=VALUE, or the NAME of a variable that is set here")
        found[name] = value if equals else os.environ[name]
    return found


def cores(given: float | None) -> float | None:
    """What `--cpus` says. Raises ConfigError."""
    if given is not None and not (math.isfinite(given) and 0.01 <= given <= 10_000):
        raise ConfigError(f"--cpus {given}: write a number of cores, such as 1.5")
    return given


def mounts(given: Sequence[str]) -> list[str]:
    """`HOST:INSIDE[:ro]`, HOST a path or a volume's name, as the engine wants it. Raises ConfigError."""
    found = []
    for mount in given:
        host, _, rest = mount.partition(":")
        inside, _, mode = rest.partition(":")
        if not host or not inside.startswith("/") or mode not in ("", "ro", "rw"):
            raise ConfigError(f"--mount {mount}: write HOST:/INSIDE or HOST:/INSIDE:ro")
        if "/" in host or host.startswith("."):
            path = Path(host).resolve()
            if not path.exists():
                raise ConfigError(f"--mount {mount}: {host} does not exist; make it, or correct the path")
            host = str(path)
        elif Path(host).exists():
            raise ConfigError(
                f"--mount {mount}: {host} would be a volume's name, and a path of that name is here; "
                f"write ./{mount} for the path"
            )
        found.append(f"{host}:{inside}:{mode or 'rw'}")
    return found
