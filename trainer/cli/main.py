"""Entry point of `reward-trainer` and its commands for single runs.

Every user error is one line on stderr and exit code 2. SIGINT, SIGTERM and SIGHUP raise `Stop` in the main
thread: files are written atomically, so it may come at any moment. A second signal interrupts the cleanup.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from reward_service.client import RewardClientError
from reward_service.runtime.console import open_console, show_whole_summaries
from reward_service.runtime.process import (
    NO_HOME,
    NO_POSIX,
    PATHLIB_NO_HOME,
    POSIX_MODULES,
    prepare_process,
    use_utf8,
)
from reward_service.runtime.text_files import require_unicode
from reward_service.settings import DEFAULT_CONFIG, one_line
from trainer.cli.experiments import commands, with_service
from trainer.cli.jobs import jobs_app
from trainer.cli.options import ConfigOption, Overrides, RunOption, SeedOption, SetOption, refuse_several
from trainer.cli.prepare import prompts_app
from trainer.config import ConfigError, TrainerConfig, command_overrides, load_trainer_config
from trainer.data.prompts import normalize_prompts
from trainer.data.splits import read_splits
from trainer.rl.rewards import ServiceScorer
from trainer.runs.folder import (
    RunFolder,
    is_finished,
    newest_run,
    pinned_prompts,
    resume_hint,
    resumed_config,
)
from trainer.runtime.distributed import Processes, is_first_of_job, is_first_on_machine, open_processes
from trainer.runtime.errors import DivergenceError, GuardError, JobError, RunError, user_message


class Stop(BaseException):
    """The process received a signal to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.code = 128 + number  # the exit status that shells expect


def install_signal_handlers() -> None:
    """Let the signals raise Stop from here on; an ignored one stays ignored, as `nohup` requires."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # SIGHUP: the terminal was closed
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def _stop(number: int, _frame: FrameType | None) -> None:
    raise Stop(number)


def leave(code: int) -> None:
    """Exit without waiting for threads with a request to a service that is gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        os._exit(code)
    sys.exit(code)


app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: panels cut names in a narrow window
    help="Improve a LoRA on Karlo's decoder with the rewards of the reward service.",
)

app.add_typer(commands)
app.add_typer(prompts_app, name="prompts")
app.add_typer(jobs_app, name="jobs")

ResumeOption = Annotated[
    bool,
    typer.Option(
        "--resume", help="Resume the run in --run, or the newest run of its name, with its config.yaml."
    ),
]


@app.command()
def train(
    config: Annotated[
        Path | None,
        typer.Option("--config", help="YAML file; its trainer section is read. [default: the miniature's]"),
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
        _train(resumed_config(run, config, command_overrides(seed, set_, overrides)), run, resume=True)
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
    """Start a reward service, train against it, show the gain, stop the service."""
    refuse_several("demo")
    settings = _load(config, seed, set_, overrides)
    folder = RunFolder.create(settings, run)
    with with_service(settings, config, folder.path / "service.log") as connected:
        _train(connected, run, folder)


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
    """Estimate memory, FLOPs and traffic of an iteration, before anything is loaded."""
    settings = _load(config, None, set_, overrides)
    from trainer.plan.plan import make_plan, show
    from trainer.runs.setup import quiet_libraries

    quiet_libraries()
    made = make_plan(settings, sum(weight > 0 for weight in settings.objective.weights.values()), processes)
    show(made, open_console(), as_json=as_json)


@app.command()
def generate(
    prompt: Annotated[list[str], typer.Option("--prompt", help="Prompt to generate images for; repeatable.")],
    lora: Annotated[
        Path | None, typer.Option("--lora", help="lora folder of a run; without it, the base policy.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="PNG to write.")] = Path("generated.png"),
    n: Annotated[int, typer.Option("--n", min=1, help="Images of each prompt.")] = 4,
    config: ConfigOption = DEFAULT_CONFIG,
    seed: SeedOption = None,
    set_: SetOption = None,
    overrides: Overrides = None,
) -> None:
    """Generate images with the LoRA of a run."""
    refuse_several("generate")
    settings = _load(config, seed, set_, overrides)
    for text in prompt:
        require_unicode(text, "--prompt")
    prompts = normalize_prompts(prompt)
    if not prompts:
        raise ConfigError("--prompt is empty; describe the image")
    if lora is not None and not lora.is_dir():
        raise ConfigError(f"{lora}: no such LoRA folder; give the lora folder of a run")
    _check_writable(out)
    from trainer.runs.grids import generate_run

    path = generate_run(settings, lora, prompts, n, out.resolve())
    open_console().print(f"Images: {path}", soft_wrap=True)


@app.command()
def variance(
    prompts: Annotated[int, typer.Option("--prompts", min=2, help="Use the first N training prompts.")] = 32,
    config: ConfigOption = DEFAULT_CONFIG,
    seed: SeedOption = None,
    set_: SetOption = None,
    overrides: Overrides = None,
) -> None:
    """Measure how much of the rewards' noise rollout.share removes, against a running service."""
    refuse_several("variance")
    settings = _load(config, seed, set_, overrides)
    train = read_splits(settings.prompts, settings.seed).train
    with ServiceScorer.connect(settings.service) as scorer:
        from trainer.runs.studies import variance_run

        variance_run(settings, train[:prompts], scorer, open_console())


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
        raise ConfigError("trainer.prompts.train: comparing stages needs at least two prompts")
    with ServiceScorer.connect(settings.service) as scorer:
        from trainer.runs.studies import stages_run

        stages_run(settings, train[:prompts], images, scorer, open_console())


def main() -> None:
    """Run a command; turn every user error into one line on stderr and an exit code."""
    use_utf8()
    try:
        prepare_process()
        install_signal_handlers()
        command: Any = typer.main.get_command(app)
        show_whole_summaries(command)
        code = command(standalone_mode=False)
    except Stop as stop:
        leave(_fail(_with_advice(stop), stop.code, quiet=not is_first_of_job()))
    except (typer.TyperException, ConfigError, RewardClientError, RunError) as error:
        message = error.format_message() if isinstance(error, typer.TyperException) else _with_advice(error)
        status = error.code if isinstance(error, RunError) else 2
        code = _fail(message, status, quiet=_reported_elsewhere(error))
    except OSError as error:  # a file that cannot be read or written; any other is a bug
        if error.filename is None:
            raise
        code = _fail(_with_advice(error), 2)
    except RuntimeError as error:
        if str(error) != PATHLIB_NO_HOME:
            raise
        code = _fail(NO_HOME, 2)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(("reward_service", "trainer")):
            raise
        missing = f"{error.name} is not installed; install the extra: pip install 'karlo-reward-lab[trainer]'"
        code = _fail(NO_POSIX if error.name in POSIX_MODULES else missing, 2)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int, *, quiet: bool = False) -> int:
    if not quiet:
        print(f"reward-trainer: {one_line(message)}", file=sys.stderr)
    return code


def _reported_elsewhere(error: Exception) -> bool:
    """Return True if another process of the job reports it.

    The main process reports what all of them know; the first of each machine, what is wrong with the command.
    """
    if isinstance(error, JobError):
        return error.quiet
    return isinstance(error, (typer.TyperException, ConfigError)) and not is_first_on_machine()


def _with_advice(error: BaseException) -> str:
    return "; ".join([user_message(error), *getattr(error, "__notes__", ())])


def _check_writable(out: Path) -> None:
    folder = out.resolve().parent
    if not folder.is_dir():
        raise ConfigError(f"{out}: its folder does not exist; create it or name another --out")
    if out.is_dir():
        raise ConfigError(f"{out}: it is a folder; name a PNG file with --out")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{out}: its folder cannot be written to; name another --out")


def _load(
    config: Path, seed: int | None, set_: list[str] | None, overrides: list[str] | None
) -> TrainerConfig:
    return load_trainer_config(config, command_overrides(seed, set_, overrides))


def _train(
    settings: TrainerConfig, run: Path | None, folder: RunFolder | None = None, *, resume: bool = False
) -> None:
    """Train or resume a run: check prompts and service first, then import torch and load the models."""
    with open_processes(settings.processes, settings.device) as processes, ExitStack() as stack:
        with processes.fail_together():
            if resume and run and processes.main:
                folder = RunFolder.resume(run)
                folder.write_config(settings)
        if processes.broadcast(resume and folder is not None and is_finished(folder, settings.iterations)):
            _print_finished(run, settings.iterations, processes)
            return
        if run and resume:
            stack.enter_context(_with_resume_advice(run))
        with processes.fail_together():
            prompts = (
                pinned_prompts(RunFolder(run), settings)
                if run and resume
                else read_splits(settings.prompts, settings.seed)
            )
            scorer = stack.enter_context(ServiceScorer.connect(settings.service))
            from trainer.runs.setup import check_evaluators, check_prompts_per_process
            from trainer.runs.train import train_run

            check_evaluators(settings, scorer)
            check_prompts_per_process(settings, prompts[0], processes)
            if processes.main and folder is None:
                folder = RunFolder.create(settings, run)
        # The main process keeps its own object: it holds the lock of the run.
        path = Path(processes.broadcast(str(folder.path) if folder else ""))
        with _with_resume_advice(path):
            console = open_console()
            result = train_run(settings, prompts, scorer, folder or RunFolder(path), console, processes)
            if processes.main:
                from trainer.report.report import write_report

                console.print(f"Report: {write_report(path)}", soft_wrap=True)
        found = result.reward_hacking_reason
        if found is not None and settings.guard.stop:
            raise GuardError(f"{path}: the gain is not to be trusted: {found}")


@contextmanager
def _with_resume_advice(run: Path) -> Iterator[None]:
    """Add the command that resumes the run to errors that end it without spoiling it."""
    try:
        yield
    except DivergenceError:
        raise
    except (Stop, RunError, RewardClientError, OSError) as error:
        if not hasattr(error, "__notes__"):
            error.add_note(resume_hint(run))
        raise


def _print_finished(run: Path | None, iterations: int, processes: Processes) -> None:
    if processes.main:
        open_console().print(
            f"{run} is finished: its {iterations} iterations are done; see evaluation.json in it, "
            "or raise iterations=N to continue",
            soft_wrap=True,
        )
