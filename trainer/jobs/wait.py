"""Waiting for jobs, and meanwhile keeping up the scorers that they ask."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from trainer.jobs.docker import ROLE, revive
from trainer.jobs.jobs import SCORER, Job, job_containers, jobs
from trainer.runtime.errors import ContainerError

if TYPE_CHECKING:  # the SDK is loaded where a command needs an engine
    from docker import DockerClient

_LOOK_EVERY_S = 1.0
_REVIVALS = 3


def wait(client: "DockerClient", names: Sequence[str], say: Callable[[str], None]) -> list[Job]:
    """Wait until jobs have ended; meanwhile start their scorers again where these are ended by force.

    Args:
        say: told in a line what happens
    """
    names = [job.name for job in jobs(client, names)]
    told: set[str] = set()
    revivals: dict[str, int] = {}
    while True:
        # Others may remove jobs meanwhile, or let them go on.
        found = [job for job in jobs(client) if job.name in names]
        over = {job.name for job in found if job.over}
        for job in found:
            if job.over and job.name not in told:
                say(f"{job.name}: {job.state}{_last_line(client, job)}")
        told = over
        if len(over) == len(found):
            return found
        _bring_back(client, [job.name for job in found], revivals, say)
        time.sleep(_LOOK_EVERY_S)


def mend(client: "DockerClient", say: Callable[[str], None]) -> None:
    """Start again the scorers of jobs where these were ended by force; tell of others that do not run."""
    _bring_back(client, (), {}, say)
    running = {it.name for it in client.containers.list(filters={"label": f"{ROLE}=scorer"})}
    for name in sorted(_scorers_wanted(client, ()) - running):
        say(f"{name} does not run, and jobs wait for it; start it: docker compose up -d reward")


def keep_scorer(
    client: "DockerClient", name: str, say: Callable[[str], None], still: Callable[[], bool]
) -> None:
    """Do for one job what `wait` does meanwhile, until the job ends or `still` says no."""
    revivals: dict[str, int] = {}
    with suppress(ContainerError):
        while still() and not jobs(client, [name])[0].over:
            _bring_back(client, [name], revivals, say)
            time.sleep(_LOOK_EVERY_S)


def _last_line(client: "DockerClient", job: Job) -> str:
    """Of a job that did not end well, what it said last."""
    if job.exit_code == 0:
        return ""
    said = job_containers(client, [job.name])[0].logs(tail=5).decode(errors="replace").split("\n")
    return next((f": {line.strip()}" for line in reversed(said) if line.strip()), "")


def _scorers_wanted(client: "DockerClient", names: Sequence[str]) -> set[str]:
    """The scorers of jobs that run."""
    running = [it for it in job_containers(client, names) if it.attrs["State"]["Running"]]
    return {container.labels.get(SCORER, "") for container in running} - {""}


def _bring_back(
    client: "DockerClient", names: Sequence[str], revivals: dict[str, int], say: Callable[[str], None]
) -> None:
    """Start again the scorers of jobs that run; a few times, in case they are ended by force each time."""
    for scorer in sorted(_scorers_wanted(client, names)):
        if revivals.get(scorer, 0) < _REVIVALS and revive(client, scorer):
            revivals[scorer] = revivals.get(scorer, 0) + 1
            say(f"{scorer} was ended by force; it has been started again")
