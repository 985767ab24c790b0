"""Commands of `reward-service`: serve evaluators, score offline, calibrate, and manage models and API keys.

Every error that the user can fix is one line on stderr and exit code 2.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from reward_service.config import load_config
from reward_service.runtime.console import show_whole_summaries
from reward_service.runtime.process import (
    NO_HOME,
    NO_POSIX,
    PATHLIB_NO_HOME,
    POSIX_MODULES,
    prepare_process,
    use_utf8,
)
from reward_service.runtime.signals import interrupt_on_ctrl_c, leave
from reward_service.settings import DEFAULT_CONFIG, ConfigError, one_line

app = typer.Typer(
    help="Score images by their prompts with four evaluators.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigOption = Annotated[Path, typer.Option("--config", help="Configuration file.")]
SetOption = Annotated[
    list[str], typer.Option("--set", help="Override a setting: key.subkey=value; repeatable.")
]
EvaluatorsOption = Annotated[str | None, typer.Option(help="Comma-separated names; all by default.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides: key.subkey=value ...")]

KEYS_FILE = Path("keys.yaml")
DETERMINISTIC = "Make scores independent of the rest of the batch: fixed batch shapes, slower."


class NormalizationName(StrEnum):
    """Values of --normalization."""

    unit = "unit"
    z = "z"
    raw = "raw"


class DeviationName(StrEnum):
    """Values of --std."""

    within = "within"
    total = "total"


class FormatName(StrEnum):
    """Values of --format."""

    csv = "csv"
    jsonl = "jsonl"


class PermissionName(StrEnum):
    """Values of --may."""

    score = "score"
    metrics = "metrics"


class UserError(Exception):
    """An error that the user can fix; the message is one line."""


@app.callback()
def reward_service(context: typer.Context) -> None:
    """Score images by their prompts with four evaluators."""
    if context.invoked_subcommand != "serve":  # which has handlers of its own, and until then nothing to lose
        interrupt_on_ctrl_c()


@app.command()
def serve(
    overrides: Overrides = None,
    config: ConfigOption = DEFAULT_CONFIG,
    settings: SetOption = [],  # noqa: B006 - typer needs a list, and nothing changes it
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 for a free one.")] = None,
) -> None:
    """Serve the evaluators over HTTP until Ctrl-C or SIGTERM."""
    # As JSON, which is YAML too: a plain :: would be a mapping.
    address = {"host": host, "port": port}
    options = [f"{key}={json.dumps(value)}" for key, value in address.items() if value is not None]
    loaded = load_config(config, [*settings, *(overrides or []), *options])
    from reward_service.web.server import serve as run

    if failure := run(loaded, _print_stdout):
        raise UserError(failure)
    leave(0)


@app.command()
def score(
    images: Annotated[list[Path], typer.Argument(help="Images: PNG, JPEG or WebP files.")],
    prompt: Annotated[
        list[str], typer.Option(help="What the images should show: once for all images, or once per image.")
    ],
    config: ConfigOption = DEFAULT_CONFIG,
    settings: SetOption = [],  # noqa: B006 - typer needs a list, and nothing changes it
    evaluators: EvaluatorsOption = None,
    normalization: Annotated[
        NormalizationName, typer.Option(help="Kind of score that the reward averages.")
    ] = NormalizationName.unit,
    deterministic: Annotated[bool, typer.Option("--deterministic", help=DETERMINISTIC)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the service's response as JSON.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print one CSV row per image.")] = False,
) -> None:
    """Score images without a server."""
    if as_json and as_csv:
        raise UserError("--json and --csv exclude each other; choose one")
    from reward_service.cli.score import OfflineRequest, print_scores, score_files

    names = _split_names(evaluators)
    request = OfflineRequest(tuple(images), tuple(prompt), names, normalization.value, deterministic)
    report = score_files(load_config(config, settings), request, _print_stderr)
    print_scores(report, "json" if as_json else "csv" if as_csv else "table")


@app.command()
def calibrate(
    output: Annotated[
        Path, typer.Option(help="Calibration table to write (JSON), for the setting `calibration`.")
    ],
    images: Annotated[Path | None, typer.Option(help="Folder of the images to score.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="CSV or JSONL with columns image, prompt and, optionally, prompt_id.")
    ] = None,
    pairs: Annotated[
        Path | None, typer.Option(help="Human preferences, CSV or JSONL: prompt, preferred, rejected.")
    ] = None,
    scores: Annotated[
        list[Path],
        typer.Option(
            help="With --images: the score file to continue. Without: score files to merge; repeatable."
        ),
    ] = [],  # noqa: B006 - typer needs a list, and nothing changes it
    form: Annotated[
        FormatName | None,
        typer.Option("--format", help="Format of --prompts and --pairs; by default from their suffixes."),
    ] = None,
    std: Annotated[
        DeviationName, typer.Option(help="Which σ scales z: within prompts (training) or total (dashboards).")
    ] = DeviationName.within,
    evaluators: EvaluatorsOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
    resamples: Annotated[int, typer.Option(min=100, max=100_000, help="Resamples of the bootstrap.")] = 2000,
    deterministic: Annotated[bool, typer.Option("--deterministic", help=DETERMINISTIC)] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing table.")] = False,
    config: ConfigOption = DEFAULT_CONFIG,
    settings: SetOption = [],  # noqa: B006 - typer needs a list, and nothing changes it
) -> None:
    """Make a calibration table from your own images.

    It has means, deviations, their intervals and correlations.
    """
    from reward_service.calibrate.run import CalibrationRequest
    from reward_service.calibrate.run import calibrate as run
    from reward_service.calibrate.tables import print_table

    request = CalibrationRequest(
        output=output,
        images=images,
        prompts=prompts,
        pairs=pairs,
        scores=tuple(scores),
        file_format=form.value if form else None,
        evaluators=_split_names(evaluators),
        std=std.value,
        seed=seed,
        resamples=resamples,
        deterministic=deterministic,
        force=force,
    )
    print_table(run(request, lambda: load_config(config, settings), _print_stderr))
    _print_stdout(f"calibration: {output}; serve with {_set_option('calibration', output)}")


@app.command()
def evaluators(
    config: ConfigOption = DEFAULT_CONFIG,
    settings: SetOption = [],  # noqa: B006 - typer needs a list, and nothing changes it
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """List the configured evaluators with fingerprints.

    Runs no model and downloads no file.
    """
    from reward_service.cli.models import list_evaluators, print_evaluators

    print_evaluators(list_evaluators(load_config(config, settings), _print_stderr), as_json=as_json)


@app.command()
def download(
    config: ConfigOption = DEFAULT_CONFIG,
    settings: SetOption = [],  # noqa: B006 - typer needs a list, and nothing changes it
    everything: Annotated[bool, typer.Option("--all", help="Include disabled evaluators.")] = False,
) -> None:
    """Download and verify all files of the configured evaluators."""
    from reward_service.cli.models import download_models

    loaded = load_config(config, settings)
    names = tuple(loaded.evaluators if everything else loaded.enabled)
    download_models(loaded, names, _print_stderr, _print_stdout)


@app.command()
def canary(
    config: ConfigOption = DEFAULT_CONFIG,
    settings: SetOption = [],  # noqa: B006 - typer needs a list, and nothing changes it
    write: Annotated[
        bool, typer.Option("--write", help="Write the current scores as golden scores.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="File to write; by default that of the setting `canary`.")
    ] = None,
) -> None:
    """Compare the canary's scores with its golden scores, or write new ones."""
    from reward_service.cli.models import compare_canary, write_golden_scores

    loaded = load_config(config, settings)
    if not write:
        if failure := compare_canary(loaded, _print_stderr, _print_stdout):
            raise UserError(failure)
        return
    if (path := output or loaded.canary) is None:
        raise UserError("no file to write to; name one with --output, or in service.canary")
    write_golden_scores(loaded, path, _print_stderr)
    _print_stdout(f"canary: {path}; serve with {_set_option('canary', path)}")


keys = typer.Typer(help="Manage API keys.", rich_markup_mode=None)
app.add_typer(keys, name="keys")


@keys.callback()
def keys_group() -> None:
    """Manage API keys."""


@keys.command()
def new(
    name: Annotated[
        str, typer.Argument(help="Name of the client: letters, digits, dots, dashes, underscores.")
    ],
    weight: Annotated[float, typer.Option(help="Share of the device relative to other clients.")] = 1.0,
    may: Annotated[
        list[PermissionName] | None, typer.Option(help="Permission of the key; repeatable, all by default.")
    ] = None,
    file: Annotated[Path, typer.Option(help="File to append the key's hash to.")] = KEYS_FILE,
) -> None:
    """Create an API key.

    It is printed once; its hash is appended to a file for the setting `auth.keys`.
    """
    from reward_service.scoring.auth import new_key

    key, count = new_key(file, name, weight, [permission.value for permission in may] if may else None)
    _print_stdout(key)
    more = f"; {name} now has {count} keys, remove those no longer used" if count > 1 else ""
    _print_stderr(f"hash appended to {file}{more}")
    _print_stderr(f"serve with {_set_option('auth.keys', file)}; a running service reloads the file")


@keys.command()
def remove(
    name: Annotated[str, typer.Argument(help="Name of the client.")],
    file: Annotated[Path, typer.Option(help="File to remove the keys from.")] = KEYS_FILE,
) -> None:
    """Remove all API keys of a client.

    A running service that uses the file then rejects them.
    """
    from reward_service.scoring.auth import remove_keys

    count = remove_keys(file, name)
    _print_stderr(f"{file}: {count} key{'s' * (count > 1)} of {name} removed")


def _split_names(option: str | None) -> tuple[str, ...] | None:
    """Return the names of `a,b`; None for all."""
    if option is None:
        return None
    names = tuple(name.strip() for name in option.split(",") if name.strip())
    if not names:
        raise UserError("--evaluators names none; name at least one, or omit it for all")
    return names


def _set_option(key: str, path: Path) -> str:
    """Return an option that a shell takes as it is.

    The path stays as it was given, but absolute: a link in it may point to another file later.
    """
    return f"--set {shlex.quote(f'{key}={path.absolute()}')}"


def _print_stdout(line: str) -> None:
    print(line, flush=True)


def _print_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _exit_with_error(message: str) -> NoReturn:
    _print_stderr(f"reward-service: {one_line(message)}")
    sys.exit(2)


def _usage_message(error: typer.TyperException) -> str:
    message = one_line(error.format_message()).rstrip(".")
    return f"{message[:1].lower()}{message[1:]}"


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command `reward-service`."""
    if arguments is None:
        use_utf8()
    try:
        prepare_process()
        command: Any = typer.main.get_command(app)
        show_whole_summaries(command)
        sys.exit(command.main(arguments, prog_name="reward-service", standalone_mode=False))
    except typer.TyperException as error:
        _exit_with_error(f"{_usage_message(error)}; see reward-service --help")
    except (ConfigError, UserError) as error:
        _exit_with_error(str(error))
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("reward_service"):
            raise
        if error.name in POSIX_MODULES:
            _exit_with_error(NO_POSIX)
        _exit_with_error(
            f"{error.name} is not installed; install the extra: pip install 'karlo-reward-lab[service]'"
        )
    except RuntimeError as error:
        if str(error) != PATHLIB_NO_HOME:
            raise
        _exit_with_error(NO_HOME)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
