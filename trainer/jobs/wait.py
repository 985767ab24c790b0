"""Wait for jobs, and restart their scorers that were killed."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from trainer.jobs.docker import ROLE, restart_if_killed
from trainer.jobs.jobs import SCORER, Job, job_containers, jobs
from trainer.runtime.errors import ContainerError

if TYPE_CHECKING:  # the SDK is imported by the commands that need an engine
    from docker import DockerClient

_POLL_S = 1.0
_MAX_RESTARTS = 3  # of each scorer


def wait(client: "DockerClient", names: Sequence[str], report: Callable[[str], None]) -> list[Job]:
    """Wait until jobs have ended, and meanwhile restart their scorers that are killed.

    Args:
        client: The engine.
        names: The jobs; none: all.
        report: Receives a line for each event.

    Returns:
        The jobs, with their final states.
    """
    names = [job.name for job in jobs(client, names)]
    reported: set[str] = set()
    restarts: dict[str, int] = {}
    while True:
        # Jobs may be removed or resumed meanwhile.
        current = [job for job in jobs(client) if job.name in names]
        ended = {job.name for job in current if job.has_ended}
        for job in current:
            if job.has_ended and job.name not in reported:
                report(f"{job.name}: {job.state}{_last_line(client, job)}")
        reported = ended
        if len(ended) == len(current):
            return current
        _restart_scorers(client, [job.name for job in current], restarts, report)
        time.sleep(_POLL_S)


def restart_killed_scorers(client: "DockerClient", report: Callable[[str], None]) -> None:
    """Restart the scorers of running jobs that were killed; report others that are not running."""
    _restart_scorers(client, (), {}, report)
    running = {it.name for it in client.containers.list(filters={"label": f"{ROLE}=scorer"})}
    for name in sorted(_needed_scorers(client, ()) - running):
        report(f"{name} is not running, and jobs wait for it; start it: docker compose up -d reward")


def keep_scorer_running(
    client: "DockerClient", name: str, report: Callable[[str], None], active: Callable[[], bool]
) -> None:
    """Restart the scorer of one job when it is killed, until the job ends or `active` returns False."""
    restarts: dict[str, int] = {}
    with suppress(ContainerError):
        while active() and not jobs(client, [name])[0].has_ended:
            _restart_scorers(client, [name], restarts, report)
            time.sleep(_POLL_S)


def _last_line(client: "DockerClient", job: Job) -> str:
    """Return the last line in the log of a job that failed, after a colon."""
    if job.exit_code == 0:
        return ""
    lines = job_containers(client, [job.name])[0].logs(tail=5).decode(errors="replace").split("\n")
    return next((f": {line.strip()}" for line in reversed(lines) if line.strip()), "")


def _needed_scorers(client: "DockerClient", names: Sequence[str]) -> set[str]:
    """Return the names of the scorers of running jobs."""
    running = [it for it in job_containers(client, names) if it.attrs["State"]["Running"]]
    return {container.labels.get(SCORER, "") for container in running} - {""}


def _restart_scorers(
    client: "DockerClient", names: Sequence[str], restarts: dict[str, int], report: Callable[[str], None]
) -> None:
    """Restart the scorers of running jobs that were killed, each a few times at most."""
    for scorer in sorted(_needed_scorers(client, names)):
        if restarts.get(scorer, 0) < _MAX_RESTARTS and restart_if_killed(client, scorer):
            restarts[scorer] = restarts.get(scorer, 0) + 1
            report(f"{scorer} was killed; it has been restarted")
