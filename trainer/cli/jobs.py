"""Commands `jobs …`: submit, list, follow, stop, resume, wait for and remove trainer jobs."""

import json
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from reward_service.runtime.console import open_console
from trainer.config import ConfigError
from trainer.jobs import jobs
from trainer.jobs import wait as awaiting
from trainer.jobs.docker import engine
from trainer.jobs.jobs import GRACE_S, IMAGE, Job, Limits, Submission
from trainer.jobs.submit import check_command, check_cpus, environment, mounts
from trainer.runtime.errors import ContainerError

if TYPE_CHECKING:  # the SDK is imported only by commands that need the engine
    from docker import DockerClient

jobs_app = typer.Typer(help="Run trainer jobs as containers beside a reward service.", rich_markup_mode=None)

NameArgument = Annotated[str, typer.Argument(metavar="JOB", help="The job's name.")]
NamesArgument = Annotated[list[str] | None, typer.Argument(metavar="[JOB]...", help="All by default.")]


@jobs_app.command(context_settings={"allow_interspersed_args": False})
def submit(
    context: typer.Context,
    command: Annotated[
        list[str], typer.Argument(metavar="COMMAND...", help="Such as: train --config my.yaml --seed 1")
    ],
    name: Annotated[
        str | None, typer.Option("--name", help="By default the command's name with a number.")
    ] = None,
    gpus: Annotated[str | None, typer.Option("--gpus", help="all, a number, or device=0,1.")] = None,
    cpus: Annotated[float | None, typer.Option("--cpus", min=0.01, help="Cores, such as 1.5.")] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", help="Such as 8g; a job that needs more is killed.")
    ] = None,
    shared_memory: Annotated[
        str, typer.Option("--shm-size", help="Shared memory, for jobs of several processes.")
    ] = "1g",
    env: Annotated[list[str] | None, typer.Option("--env", help="NAME=VALUE, or NAME; repeatable.")] = None,
    mount: Annotated[
        list[str] | None, typer.Option("--mount", help="HOST:/INSIDE[:ro], a path or a volume; repeatable.")
    ] = None,
    runs: Annotated[Path, typer.Option("--runs", help="The run is written to RUNS/NAME.")] = Path("runs"),
    image: Annotated[str, typer.Option("--image", help="Image of the trainer.")] = IMAGE,
    scorer: Annotated[
        str | None, typer.Option("--scorer", help="Container of the reward service; by default the only one.")
    ] = None,
    weight: Annotated[float, typer.Option("--weight", help="Share of the reward service among jobs.")] = 1.0,
    url: Annotated[str | None, typer.Option("--url", help="Address of a reward service elsewhere.")] = None,
    key_file: Annotated[
        Path | None,
        typer.Option("--key-file", help="File with its API key; by default the job gets a new key."),
    ] = None,
    network: Annotated[str | None, typer.Option("--network", help="With --url: network of the job.")] = None,
    go_on: Annotated[
        bool, typer.Option("--go-on", help="Resume the run or experiment in RUNS/NAME.")
    ] = False,
) -> None:
    """Start a job: any command of reward-trainer, with its own options, in a container."""
    if key_file is not None:
        jobs.read_key(key_file)
    if network and not url:
        raise ConfigError("--network goes with a reward service elsewhere; name it with --url")
    checked = check_command(context.find_root().command, command)
    limits = Limits(gpus, check_cpus(cpus), memory, shared_memory)
    limits.options()  # validated before anything is created
    given, mounted, runs = environment(env or [], cpus), mounts(mount or []), runs.resolve()
    with engine() as client:
        wanted = name or jobs.next_name(client, runs, command[0])
        jobs.submit(
            client,
            Submission(
                wanted,
                checked,
                runs,
                image,
                limits,
                given,
                mounted,
                scorer,
                url,
                network,
                key_file,
                weight,
                go_on,
            ),
        )
    print(wanted)
    _note(f"writing to {runs / wanted}; follow it with: reward-trainer jobs logs -f {wanted}")


@jobs_app.command("list")
def list_(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the jobs, the oldest first.

    A reward service that was killed while jobs wait for it is restarted.
    """
    with engine() as client:
        found = jobs.jobs(client)
        if as_json:
            print(json.dumps([asdict(job) for job in found], indent=1))
        elif found:
            open_console().print(table(found, expand=sys.stdout.isatty()))
        else:
            print("There are no jobs; see reward-trainer jobs submit --help.")
        awaiting.restart_killed_scorers(client, _note)


def table(found: Sequence[Job], *, expand: bool = True) -> Table:
    """Return a table with a line for each job; if it fills the terminal, long commands are cut."""
    listed = Table(expand=expand)
    for title in ("job", "state", "started", "ended"):
        listed.add_column(title, no_wrap=True)
    listed.add_column("command", no_wrap=True, overflow="ellipsis", ratio=1)
    for job in found:
        # Month to minute; --json has the rest.
        listed.add_row(job.name, job.state, job.started[5:16], job.ended[5:16], Text(job.command))
    return listed


@jobs_app.command()
def logs(
    name: NameArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends.")] = False,
    tail: Annotated[int | None, typer.Option("--tail", min=0, help="The last N lines only.")] = None,
) -> None:
    """Print a job's output. Ctrl-C does not affect the job."""
    with engine() as client:
        left = threading.Event()
        if follow:
            keep = threading.Thread(target=_keep, args=(name, left), daemon=True)
            keep.start()
        try:
            for part in jobs.logs(client, name, follow=follow, tail=tail):
                sys.stdout.buffer.write(part)
                sys.stdout.buffer.flush()
        finally:
            left.set()


@jobs_app.command()
def stop(
    names: Annotated[list[str], typer.Argument(metavar="JOB...", help="Their names.")],
    grace: Annotated[
        int, typer.Option("--grace", min=1, help="Seconds to save before the job is killed.")
    ] = GRACE_S,
) -> None:
    """Let jobs save a checkpoint and end; `resume` continues from it."""
    with engine() as client:
        late = f", checkpoint not saved within {grace} s: it will resume from an earlier one"

        def end(name: str) -> str:
            job = jobs.stop(client, name, grace)
            return f"{job.state}{late if job.state == 'killed' else ''}"

        _each(client, names, end)


@jobs_app.command()
def resume(names: Annotated[list[str], typer.Argument(metavar="JOB...", help="Their names.")]) -> None:
    """Resume jobs that were stopped, killed or failed, from their newest checkpoint."""
    with engine() as client:

        def again(name: str) -> str:
            jobs.resume(client, name)
            return "resumed"

        _each(client, names, again)


@jobs_app.command()
def wait(names: NamesArgument = None) -> None:
    """Wait until jobs have ended: exit code 0 if all are done, else 1. Ctrl-C does not affect them.

    A reward service that is killed meanwhile is restarted.
    """
    with engine() as client:
        found = awaiting.wait(client, names or (), _note)
    if not found:
        _note("there are no jobs")
    if any(job.exit_code != 0 for job in found):
        raise typer.Exit(1)


@jobs_app.command()
def remove(names: Annotated[list[str], typer.Argument(metavar="JOB...", help="Their names.")]) -> None:
    """Remove jobs that are not running, and their keys. Their files stay."""
    with engine() as client:
        _each(client, names, lambda name: f"removed; {jobs.remove(client, name)}")


def _each(client: "DockerClient", names: Sequence[str], do: Callable[[str], str]) -> None:
    """Apply `do` to each job and log its result; raise ContainerError for all failures at the end."""
    jobs.jobs(client, names)  # raises for an unknown name
    wrong = []
    for name in dict.fromkeys(names):
        try:
            _note(f"{name}: {do(name)}")
        except ContainerError as error:
            wrong.append(str(error))
    if wrong:
        raise ContainerError("; ".join(wrong))


def _keep(name: str, left: threading.Event) -> None:
    """Restart a killed reward service while the log is followed, over a connection of its own."""
    with suppress(Exception), engine() as client:
        awaiting.keep_scorer_running(client, name, _note, lambda: not left.is_set())


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
