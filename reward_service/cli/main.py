"""`reward-service`: serve the service, or score images without a server.

Whatever the user can mend is one line on stderr and exit code 2.
"""

from __future__ import annotations

import codecs
import io
import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from reward_service.config import load_config
from reward_service.settings import DEFAULT_CONFIG, ConfigError, one_line, rest_idle_threads

app = typer.Typer(
    help="Judge images by their prompts with four evaluators.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigOption = Annotated[Path, typer.Option("--config", help="Configuration file.")]
SetOption = Annotated[list[str], typer.Option("--set", help="Override: section.key=value; repeatable.")]
EvaluatorsOption = Annotated[str | None, typer.Option(help="Names, with commas between; all by default.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides: section.key=value ...")]

KEYS_FILE = Path("keys.yaml")
DETERMINISTIC = "Let scores depend on nothing but the pair: fixed batch shapes, slower."


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


# typer brings a click of its own from some version on; this is the root of either's usage errors.
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[2]


class UserError(Exception):
    """Something the user can mend; the message is one line."""


@app.callback()
def reward_service() -> None:
    """Judge images by their prompts with four evaluators."""


@app.command()
def serve(
    overrides: Overrides = None,
    config: ConfigOption = DEFAULT_CONFIG,
    settings: SetOption = [],  # noqa: B006 - typer wants a list, and nobody changes it
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 for a free one.")] = None,
) -> None:
    """Serve the evaluators over HTTP until Ctrl-C or SIGTERM."""
    given = {"host": host, "port": port}
    # As JSON, which is YAML too: the plain :: is a mapping.
    options = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    loaded = load_config(config, [*settings, *(overrides or []), *options])
    from reward_service.web.server import serve as run

    if failure := run(loaded, _say):
        raise UserError(failure)


@app.command()
def score(
    images: Annotated[list[Path], typer.Argument(help="Images: PNG, JPEG or WebP files.")],
    prompt: Annotated[
        list[str], typer.Option(help="What the images should show: once for all, or once for each of them.")
    ],
    config: ConfigOption = DEFAULT_CONFIG,
    settings: SetOption = [],  # noqa: B006 - typer wants a list, and nobody changes it
    evaluators: EvaluatorsOption = None,
    normalization: Annotated[
        NormalizationName, typer.Option(help="What the reward is the mean of.")
    ] = NormalizationName.unit,
    deterministic: Annotated[bool, typer.Option("--deterministic", help=DETERMINISTIC)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the service's response.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print a line of CSV for each image.")] = False,
) -> None:
    """Score images without a server."""
    if as_json and as_csv:
        raise UserError("--json and --csv are two forms of one answer; choose one")
    from reward_service.cli.score import Request, print_scores, score_files

    names = _names(evaluators)
    request = Request(tuple(images), tuple(prompt), names, normalization.value, deterministic)
    report = score_files(load_config(config, settings), request, _note)
    print_scores(report, "json" if as_json else "csv" if as_csv else "table")


@app.command()
def calibrate(
    output: Annotated[Path, typer.Option(help="Table to write: JSON, for `calibration:` to name.")],
    images: Annotated[Path | None, typer.Option(help="Folder of the images to score.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="CSV or JSONL: image, prompt and, if you like, prompt_id.")
    ] = None,
    pairs: Annotated[
        Path | None, typer.Option(help="People's choices, CSV or JSONL: prompt, preferred, rejected.")
    ] = None,
    scores: Annotated[
        list[Path],
        typer.Option(
            help="With --images: the file of scores to go on with. Without: files to merge; repeatable."
        ),
    ] = [],  # noqa: B006 - typer wants a list, and nobody changes it
    form: Annotated[
        FormatName | None, typer.Option("--format", help="Of --prompts and --pairs; else by their suffix.")
    ] = None,
    std: Annotated[
        DeviationName, typer.Option(help="Which σ scales z: within prompts (learning) or total (dashboards).")
    ] = DeviationName.within,
    evaluators: EvaluatorsOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
    resamples: Annotated[int, typer.Option(min=100, max=100_000, help="Of the bootstrap.")] = 2000,
    deterministic: Annotated[bool, typer.Option("--deterministic", help=DETERMINISTIC)] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a table that is there.")] = False,
    config: ConfigOption = DEFAULT_CONFIG,
    settings: SetOption = [],  # noqa: B006 - typer wants a list, and nobody changes it
) -> None:
    """Make a calibration table of your own images: mean, deviations, intervals, correlations."""
    from reward_service.calibrate.run import Request
    from reward_service.calibrate.run import calibrate as run
    from reward_service.calibrate.tables import print_table

    request = Request(
        output=output,
        images=images,
        prompts=prompts,
        pairs=pairs,
        scores=tuple(scores),
        form=form.value if form else None,
        evaluators=_names(evaluators),
        std=std.value,
        seed=seed,
        resamples=resamples,
        deterministic=deterministic,
        force=force,
    )
    print_table(run(request, lambda: load_config(config, settings), _note))
    _say(f"calibration: {output}; serve with --set calibration={output.resolve()}")


@app.command()
def evaluators(
    config: ConfigOption = DEFAULT_CONFIG,
    settings: SetOption = [],  # noqa: B006 - typer wants a list, and nobody changes it
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """List what is configured, with fingerprints; no model is run and no file fetched."""
    from reward_service.cli.models import list_evaluators, print_evaluators

    print_evaluators(list_evaluators(load_config(config, settings), _note), as_json=as_json)


@app.command()
def download(
    config: ConfigOption = DEFAULT_CONFIG,
    settings: SetOption = [],  # noqa: B006 - typer wants a list, and nobody changes it
    everything: Annotated[bool, typer.Option("--all", help="Evaluators that are off, too.")] = False,
) -> None:
    """Fetch every file of the configured evaluators ahead of time and check their hashes."""
    from reward_service.cli.models import download as run

    loaded = load_config(config, settings)
    run(loaded, tuple(loaded.evaluators if everything else loaded.enabled), _note, _say)


@app.command()
def canary(
    config: ConfigOption = DEFAULT_CONFIG,
    settings: SetOption = [],  # noqa: B006 - typer wants a list, and nobody changes it
    write: Annotated[bool, typer.Option("--write", help="Take the scores of now as golden.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="File to write, for `canary:` to name; else the one it names.")
    ] = None,
) -> None:
    """Score the canary pair and compare it with its golden scores, or write those."""
    from reward_service.cli import models as goldens

    loaded = load_config(config, settings)
    if not write:
        if failure := goldens.compare(loaded, _note, _say):
            raise UserError(failure)
        return
    if (path := output or loaded.canary) is None:
        raise UserError("no file to write to; name one with --output, or as service.canary")
    goldens.write(loaded, path, _note)
    _say(f"canary: {path}; serve with --set canary={path.resolve()}")


keys = typer.Typer(help="The keys of those who may ask the service.", rich_markup_mode=None)
app.add_typer(keys, name="keys")


@keys.callback()
def keys_() -> None:
    """The keys of those who may ask the service."""


@keys.command()
def new(
    name: Annotated[str, typer.Argument(help="Whose key it is: letters, digits, dots, dashes, underscores.")],
    weight: Annotated[float, typer.Option(help="Share of the device beside the other clients.")] = 1.0,
    may: Annotated[
        list[PermissionName] | None, typer.Option(help="What it is for; repeatable, everything by default.")
    ] = None,
    file: Annotated[Path, typer.Option(help="File to append the key's hash to.")] = KEYS_FILE,
) -> None:
    """Make a key, print it this once, and append its hash to a file for `auth.keys` to name."""
    from reward_service.scoring.auth import new_key

    key, count = new_key(file, name, weight, [permission.value for permission in may] if may else None)
    _say(key)
    more = f"; {name} has {count} keys now, remove those no longer used" if count > 1 else ""
    _note(f"hash appended to {file}{more}")
    _note(f"serve with --set auth.keys={file.resolve()}; a service that runs with it notices the change")


@keys.command()
def remove(
    name: Annotated[str, typer.Argument(help="Whose keys.")],
    file: Annotated[Path, typer.Option(help="File to take them out of.")] = KEYS_FILE,
) -> None:
    """Take all keys of a name out of a file; a service that runs with it lets them in no more."""
    from reward_service.scoring.auth import remove_keys

    count = remove_keys(file, name)
    _note(f"{file}: {count} key{'s' * (count > 1)} of {name} removed")


def _names(listed: str | None) -> tuple[str, ...] | None:
    """`a,b` as names; None for all."""
    if listed is None:
        return None
    names = tuple(name.strip() for name in listed.split(",") if name.strip())
    if not names:
        raise UserError("--evaluators names none; name some, or leave it out for all")
    return names


def _say(line: str) -> None:
    print(line, flush=True)


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _leave(message: str) -> NoReturn:
    _note(f"reward-service: {one_line(message)}")
    sys.exit(2)


def _sentence(error: Any) -> str:
    message = one_line(error.format_message()).rstrip(".")
    return f"{message[:1].lower()}{message[1:]}"


def _print_anything() -> None:
    """Let any file name be printed: its own bytes in UTF-8, else escapes for letters not to be had."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        plain = codecs.lookup(sys.stdout.encoding).name == "utf-8"
        sys.stdout.reconfigure(errors="surrogateescape" if plain else "backslashreplace")


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command `reward-service`."""
    rest_idle_threads()
    _print_anything()
    try:
        command: Any = typer.main.get_command(app)
        sys.exit(command.main(arguments, prog_name="reward-service", standalone_mode=False))
    except USAGE_ERROR as error:
        _leave(f"{_sentence(error)}; see reward-service --help")
    except (ConfigError, UserError) as error:
        _leave(str(error))
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("reward_service"):
            raise
        _leave(f"{error.name} is not installed; install the extra: pip install 'karlo-reward-lab[service]'")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
