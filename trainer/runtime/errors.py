"""What can go wrong for a user of the trainer. Every message is one line with the cause and the remedy.

ConfigError (reward_service.settings)   the configuration, a path or an argument
└── LeakError                               a prompt, or its like, on both sides of a split
RunError                                a run cannot go on
├── RolloutError                            too few scores come back
├── DivergenceError                         the update is no number any more
├── EvaluationError                         the comparison cannot be finished
├── StorageError                            the run folder cannot be written, or is no run to go on with
├── JobError                                a process of the job cannot go on, or is gone
├── ContainerError                          the container engine, or a job in it, cannot do what was asked
├── GuardError                              the composite rose while the guard fell; exit code 3
└── DemoError                               the demo's own service does not start
"""

import textwrap

from reward_service.settings import ConfigError, one_line


class LeakError(ConfigError):
    """A prompt, a near-duplicate of it or its user is on both sides of a split."""


class RunError(Exception):
    """A run cannot go on."""

    code = 2  # the program's exit status


class RolloutError(RunError):
    """Too few scores come back."""


class DivergenceError(RunError):
    """The gradient is not finite: what was learned leads nowhere."""


class EvaluationError(RunError):
    """The comparison with the base cannot be finished."""


class StorageError(RunError):
    """The run folder cannot be written, or is no run to go on with."""


class GuardError(RunError):
    """The composite rose while the evaluator that is not trained on fell: what was learned is a trick."""

    code = 3


class JobError(RunError):
    """A process of a job cannot go on, or is gone. `quiet` where the main process says so for all."""

    def __init__(self, message: str, *, quiet: bool = False) -> None:
        super().__init__(message)
        self.quiet = quiet


class ContainerError(RunError):
    """The container engine, or a job in it, cannot do what was asked."""


class DemoError(RunError):
    """The demo's own scoring service does not start."""


def reason(error: Exception) -> str:
    """What a library says went wrong, in part of a line: its first two lines, no more than 240 letters."""
    return textwrap.shorten(one_line(" ".join(str(error).strip().splitlines()[:2])), 240, placeholder=" ...")


def said(error: BaseException) -> str:
    """What a user reads of an error: one line."""
    if isinstance(error, OSError) and error.filename is not None:
        return one_line(f"{error.filename}: {error.strerror}; name another place or make room there")
    return one_line(error)
