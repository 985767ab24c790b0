"""Console and help: no width limit away from a terminal, and no cut summaries at any width."""

import pytest
import typer
from rich.table import Table

from reward_service.cli import app as service_app
from reward_service.runtime.console import open_console, show_whole_summaries
from trainer.cli.main import app as trainer_app


def without_spaces(text: str) -> str:
    """Return the text without white space: a line may be broken anywhere."""
    return "".join(text.split())


@pytest.mark.parametrize("columns", ["0", "1", "40", "80", "100000"])
def test_a_pipe_has_no_width(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names and numbers are whole, whatever COLUMNS is, and nothing is padded to it."""
    monkeypatch.setenv("COLUMNS", columns)
    table = Table("a name", "a number")
    table.add_row("x" * 300, "0.123456789")
    open_console().print(table)
    shown = capsys.readouterr().out
    assert "x" * 300 in shown
    assert "0.123456789" in shown
    assert max(map(len, shown.splitlines())) < 330


@pytest.mark.parametrize("columns", ["0", "40", "80"])
@pytest.mark.parametrize("app", [service_app, trainer_app])
def test_help_is_not_cut(
    app: typer.Typer, columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command's summary and every option's name and text are there."""
    monkeypatch.setenv("COLUMNS", columns)
    command = typer.main.get_command(app)
    show_whole_summaries(command)
    commands = getattr(command, "commands", {})
    command.main(["--help"], prog_name="x", standalone_mode=False)
    shown = without_spaces(capsys.readouterr().out)
    assert "..." not in shown.partition("Commands:")[2]
    for name, inner in commands.items():
        if inner.hidden:
            continue
        assert without_spaces(inner.help.split("\n\n")[0]) in shown, name
        inner.main(["--help"], prog_name="x", standalone_mode=False)
        details = without_spaces(capsys.readouterr().out)
        for parameter in inner.params:
            texts = [*parameter.opts, getattr(parameter, "help", None) or ""]
            texts = [text for text in texts if text.startswith("--") or " " in text]
            assert not [text for text in texts if without_spaces(text) not in details], name
        assert "…" not in details
