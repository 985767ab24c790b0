"""Errors that a user of the trainer can fix. Every message is one line with the cause and the remedy.

ConfigError (reward_service.settings)   invalid configuration, path or argument
└── LeakError                               a prompt, a near-duplicate or a user on both sides of a split
RunError                                a run cannot continue
├── RolloutError                            too many groups without scores
├── DivergenceError                         the gradient is not finite
├── EvaluationError                         the comparison with the base policy cannot be finished
├── StorageError                            the run folder cannot be written or resumed
├── JobError                                a process of the job failed or is gone
├── ContainerError                          the container engine, or a job in it, failed
├── GuardError                              reward hacking: the composite rose, the guard fell; exit code 3
└── DemoError                               the demo's own reward service does not start
"""

import textwrap

from reward_service.settings import ConfigError, one_line


class LeakError(ConfigError):
    """A prompt, a near-duplicate of it or its user is on both sides of a split."""


class RunError(Exception):
    """A run cannot continue."""

    code = 2  # exit status of the program


class RolloutError(RunError):
    """Too many groups have no scores."""


class DivergenceError(RunError):
    """The gradient is not finite: the policy has diverged."""


class EvaluationError(RunError):
    """The comparison with the base policy cannot be finished."""


class StorageError(RunError):
    """The run folder cannot be written or resumed."""


class GuardError(RunError):
    """Reward hacking: the composite rose while the guard evaluator, which is not trained on, fell."""

    code = 3


class JobError(RunError):
    """A process of a job failed or is gone. `quiet` if the main process reports it for all."""

    def __init__(self, message: str, *, quiet: bool = False) -> None:
        super().__init__(message)
        self.quiet = quiet


class ContainerError(RunError):
    """The container engine, or a job in it, failed."""


class DemoError(RunError):
    """The demo's own reward service does not start."""


def reason(error: Exception) -> str:
    """Return a library's error message as part of a line: its first two lines, at most 240 characters."""
    return textwrap.shorten(one_line(" ".join(str(error).strip().splitlines()[:2])), 240, placeholder=" ...")


def user_message(error: BaseException) -> str:
    """Return an error as one line for the user; an OSError with its file and a remedy."""
    if isinstance(error, OSError) and error.filename is not None:
        return one_line(f"{error.filename}: {error.strerror}; choose another location or free space there")
    return one_line(error)
