"""``reward-service``: serve the judge, or score pictures without a server.

Whatever the user can mend is one line on stderr and exit code 2.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from reward_service.config import load_config
from reward_service.settings import DEFAULT_CONFIG, ConfigError, one_line, rest_idle_threads

app = typer.Typer(
    help="Judge pictures by their prompts with four evaluators.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigOption = Annotated[Path, typer.Option("--config", help="Configuration file.")]
SetOption = Annotated[list[str], typer.Option("--set", help="Override: section.key=value; repeatable.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides: section.key=value ...")]


# typer brings a click of its own from some version on; this is the root of either's usage errors.
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[2]


class UserError(Exception):
    """Something the user can mend; the message is one line."""


@app.callback()
def reward_service() -> None:
    """Judge pictures by their prompts with four evaluators."""


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
    from reward_service.server import serve as run

    if failure := run(loaded, _say, _note):
        raise UserError(failure)


@app.command()
def score(
    images: Annotated[list[Path], typer.Argument(help="Pictures: PNG, JPEG or WebP files.")],
    prompt: Annotated[str, typer.Option(help="The prompt that the pictures should fit.")],
    config: ConfigOption = DEFAULT_CONFIG,
    settings: SetOption = [],  # noqa: B006 - typer wants a list, and nobody changes it
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Score pictures without a server."""
    from reward_service.offline import print_scores, score_files

    response = score_files(load_config(config, settings), images, prompt, _note)
    print_scores(response, images, as_json=as_json)


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


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command ``reward-service``."""
    rest_idle_threads()
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
