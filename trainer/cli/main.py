"""`reward-trainer`: train, generate, demo. Every user error is one line on stderr and exit code 2.

SIGINT, SIGTERM and SIGHUP as one exception, raised in the main thread wherever it is.

Nothing that a run writes is ever half there, so it may come at any moment; whoever catches it saves what is
complete and lets it go on. A second signal interrupts that as well.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

from reward_service.client import RewardClientError
from reward_service.settings import DEFAULT_CONFIG, one_line, rest_idle_threads
from trainer.cli.experiments import commands, judged
from trainer.cli.jobs import jobs_app
from trainer.cli.options import ConfigOption, Overrides, RunOption, SeedOption, SetOption, refuse_several
from trainer.cli.prepare import prompts_app
from trainer.config import ConfigError, TrainerConfig, given, load_trainer_config
from trainer.data.prompts import clean
from trainer.data.splits import read_splits
from trainer.rl.rewards import ServiceScorer
from trainer.runs.folder import (
    RunFolder,
    how_to_go_on,
    is_finished,
    newest_run,
    pinned_prompts,
    resumed_config,
)
from trainer.runtime.distributed import Processes, first_of_job, open_processes, second_on_its_machine
from trainer.runtime.errors import DivergenceError, GuardError, JobError, RunError, said


class Stop(BaseException):
    """The program was asked to leave."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.code = 128 + number  # the exit status by which shells know it


def heed_signals() -> None:
    """Have the signals raise Stop from here on; one that is ignored stays ignored, as nohup wants it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # SIGHUP: the terminal was closed
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def _stop(number: int, _frame: FrameType | None) -> None:
    raise Stop(number)


def leave(code: int) -> None:
    """Exit without waiting for threads that may be asking a service that is gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        os._exit(code)
    sys.exit(code)


app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Improve a LoRA on Karlo's decoder with the rewards of the scoring service.",
)

app.add_typer(commands)
app.add_typer(prompts_app, name="prompts")
app.add_typer(jobs_app, name="jobs")

ResumeOption = Annotated[
    bool,
    typer.Option(
        "--resume", help="Go on with the run in --run, or with the newest of its name; see its config.yaml."
    ),
]


@app.command()
def train(
    config: Annotated[
        Path | None,
        typer.Option("--config", help="YAML file; its trainer section is read. \\[default: the miniature's]"),
    ] = None,
    seed: SeedOption = None,
    run: RunOption = None,
    resume: ResumeOption = False,
    set_: SetOption = None,
    overrides: Overrides = None,
) -> None:
    """Train against a running service and compare with the base on held-out prompts."""
    if resume:
        if overrides and "=" not in overrides[0] and run is None:  # --resume RUN
            run, overrides = Path(overrides[0]), overrides[1:]
        run = run or newest_run(_load(config or DEFAULT_CONFIG, seed, set_, overrides))
        _train(resumed_config(run, config, given(seed, set_, overrides)), run, resume=True)
    else:
        _train(_load(config or DEFAULT_CONFIG, seed, set_, overrides), run)


@app.command()
def demo(
    config: ConfigOption = DEFAULT_CONFIG,
    seed: SeedOption = None,
    run: RunOption = None,
    set_: SetOption = None,
    overrides: Overrides = None,
) -> None:
    """Start a service of its own, train against it, show the gain, stop the service."""
    refuse_several("demo")
    settings = _load(config, seed, set_, overrides)
    folder = RunFolder.create(settings, run)
    with judged(settings, config, folder.path / "service.log") as reached:
        _train(reached, run, folder)


@app.command()
def plan(
    config: ConfigOption = DEFAULT_CONFIG,
    processes: Annotated[
        int, typer.Option("--processes", min=1, help="Processes that share an iteration.")
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    set_: SetOption = None,
    overrides: Overrides = None,
) -> None:
    """Say what memory, arithmetic and traffic an iteration takes, before anything is loaded."""
    settings = _load(config, None, set_, overrides)
    from trainer.plan.plan import make_plan, show
    from trainer.runs.setup import quiet_libraries

    quiet_libraries()
    made = make_plan(settings, sum(weight > 0 for weight in settings.objective.weights.values()), processes)
    show(made, Console(), as_json=as_json)


@app.command()
def generate(
    prompt: Annotated[list[str], typer.Option("--prompt", help="What to draw; may be given several times.")],
    lora: Annotated[
        Path | None, typer.Option("--lora", help="lora folder of a run; without it the base draws.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="PNG to write.")] = Path("generated.png"),
    n: Annotated[int, typer.Option("--n", min=1, help="Images of each prompt.")] = 4,
    config: ConfigOption = DEFAULT_CONFIG,
    seed: SeedOption = None,
    set_: SetOption = None,
    overrides: Overrides = None,
) -> None:
    """Draw images with the result of a run."""
    refuse_several("generate")
    settings = _load(config, seed, set_, overrides)
    prompts = clean(prompt)
    if not prompts:
        raise ConfigError("--prompt is empty; say what to draw")
    if lora is not None and not lora.is_dir():
        raise ConfigError(f"{lora}: no such LoRA folder; give the lora folder of a run")
    _check_writable(out)
    from trainer.runs.grids import generate_run

    path = generate_run(settings, lora, prompts, n, out.resolve())
    Console().print(f"Images: {path}", soft_wrap=True)


@app.command()
def variance(
    prompts: Annotated[int, typer.Option("--prompts", min=2, help="Use the first N training prompts.")] = 32,
    config: ConfigOption = DEFAULT_CONFIG,
    seed: SeedOption = None,
    set_: SetOption = None,
    overrides: Overrides = None,
) -> None:
    """Measure how much of the noise in the rewards rollout.share takes away, against a running service."""
    refuse_several("variance")
    settings = _load(config, seed, set_, overrides)
    train = read_splits(settings.prompts, settings.seed).train
    with ServiceScorer.connect(settings.service) as scorer:
        from trainer.runs.studies import variance_run

        variance_run(settings, train[:prompts], scorer, Console())


@app.command()
def stages(
    prompts: Annotated[int, typer.Option("--prompts", min=2, help="Use the first N training prompts.")] = 32,
    images: Annotated[int, typer.Option("--images", min=2, help="Images of each prompt.")] = 8,
    config: ConfigOption = DEFAULT_CONFIG,
    seed: SeedOption = None,
    set_: SetOption = None,
    overrides: Overrides = None,
) -> None:
    """Measure whether images can be rewarded before super-resolution, against a running service."""
    refuse_several("stages")
    settings = _load(config, seed, set_, overrides)
    train = read_splits(settings.prompts, settings.seed).train
    if len(train) < 2:
        raise ConfigError("trainer.prompts.train: two prompts at least are needed to compare stages")
    with ServiceScorer.connect(settings.service) as scorer:
        from trainer.runs.studies import stages_run

        stages_run(settings, train[:prompts], images, scorer, Console())


def main() -> None:
    """Entry point: runs a command, turns what can go wrong for a user into one line and an exit code."""
    rest_idle_threads()
    heed_signals()
    try:
        code = app(standalone_mode=False)
    except Stop as stop:
        leave(_fail(_with_advice(stop), stop.code, quiet=not first_of_job()))
    except (USAGE_ERROR, ConfigError, RewardClientError, RunError) as error:
        message = error.format_message() if isinstance(error, USAGE_ERROR) else _with_advice(error)  # type: ignore[attr-defined]
        status = error.code if isinstance(error, RunError) else 2
        code = _fail(message, status, quiet=_said_elsewhere(error))
    except OSError as error:  # a file that cannot be read or written; anything else is a fault of ours
        if error.filename is None:
            raise
        code = _fail(_with_advice(error), 2)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(("reward_service", "trainer")):
            raise
        code = _fail(
            f"{error.name} is not installed; install the extra: pip install 'karlo-reward-lab[trainer]'", 2
        )
    sys.exit(code if isinstance(code, int) else 0)


# typer's own errors (its copy of click's ClickException), found by way of the one that it exports.
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[2]


def _fail(message: str, code: int, *, quiet: bool = False) -> int:
    if not quiet:
        print(f"reward-trainer: {one_line(message)}", file=sys.stderr)
    return code


def _said_elsewhere(error: Exception) -> bool:
    """Whether another process of the job says it: the main one what all of them know, and of what is wrong
    with the command, the first on each machine."""
    if isinstance(error, JobError):
        return error.quiet
    return isinstance(error, (USAGE_ERROR, ConfigError)) and second_on_its_machine()


def _with_advice(error: BaseException) -> str:
    return "; ".join([said(error), *getattr(error, "__notes__", ())])


def _check_writable(out: Path) -> None:
    folder = out.resolve().parent
    if not folder.is_dir():
        raise ConfigError(f"{out}: its folder does not exist; make it or name another --out")
    if out.is_dir():
        raise ConfigError(f"{out}: this is a folder; name a PNG file with --out")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{out}: its folder cannot be written to; name another --out")


def _load(
    config: Path, seed: int | None, set_: list[str] | None, overrides: list[str] | None
) -> TrainerConfig:
    return load_trainer_config(config, given(seed, set_, overrides))


def _train(
    settings: TrainerConfig, run: Path | None, folder: RunFolder | None = None, *, resume: bool = False
) -> None:
    """Cheap checks first: prompts, then the service; only then the seconds that torch and the models take."""
    with open_processes(settings.processes, settings.device) as processes, ExitStack() as stack:
        with processes.one_fate():
            if resume and run and processes.main:
                folder = RunFolder.resume(run)
                folder.write_config(settings)
        if processes.from_main(resume and folder is not None and is_finished(folder, settings.iterations)):
            _say_finished(run, settings.iterations, processes)
            return
        if run and resume:
            stack.enter_context(_saying_how_to_go_on(run))
        with processes.one_fate():
            prompts = (
                pinned_prompts(RunFolder(run), settings)
                if run and resume
                else read_splits(settings.prompts, settings.seed)
            )
            scorer = stack.enter_context(ServiceScorer.connect(settings.service))
            from trainer.runs.setup import check_evaluators, check_share
            from trainer.runs.train import train_run

            check_evaluators(settings, scorer)
            check_share(settings, prompts[0], processes)
            if processes.main and folder is None:
                folder = RunFolder.create(settings, run)
        # The main process holds on to its own: it is what keeps the run locked.
        path = Path(processes.from_main(str(folder.path) if folder else ""))
        with _saying_how_to_go_on(path):
            result = train_run(settings, prompts, scorer, folder or RunFolder(path), Console(), processes)
            if processes.main:
                from trainer.report.report import write_report

                Console().print(f"Report:   {write_report(path)}", soft_wrap=True)
        found = result.gamed
        if found is not None and settings.guard.stop:
            raise GuardError(f"{path}: the gain is not to be trusted: {found}")


@contextmanager
def _saying_how_to_go_on(run: Path) -> Iterator[None]:
    """Errors within this block that end the run, but do not spoil it, say how to go on with it."""
    try:
        yield
    except DivergenceError:
        raise
    except (Stop, RunError, RewardClientError, OSError) as error:
        if not hasattr(error, "__notes__"):
            error.add_note(how_to_go_on(run))
        raise


def _say_finished(run: Path | None, iterations: int, processes: Processes) -> None:
    if processes.main:
        Console().print(
            f"{run} is finished: its {iterations} iterations are done; see evaluation.json in it, "
            "or have it do more with iterations=N",
            soft_wrap=True,
        )
