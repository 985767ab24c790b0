"""User errors of `python -m miniature` are one line."""

import sys
from pathlib import Path

import pytest

from miniature.cli import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command"),
        (["fly"], "fly"),
        (["build", "--nonsense"], "nonsense"),
        (["build", "--effort", "-1"], "--effort"),
        (["build", "--out", "{file}"], "a file"),
        (["build", "--out", "{folder}/models", "--work", "{file}/work"], "a file"),
        (["calibrate", "--out", "{folder}/missing/table.json"], "--out"),
        (["calibrate", "--out", "{folder}"], "--out"),
        (["evaluate", "--config", "{folder}/missing.yaml"], "missing.yaml"),
        (["evaluate", "--seed", "-1"], "--seed"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Cause and remedy without a traceback, before any long computation."""
    file = tmp_path / "a file"
    file.touch()
    formatted = [part.format(file=file, folder=tmp_path) for part in arguments]
    monkeypatch.setattr(sys, "argv", ["miniature", *formatted])
    with pytest.raises(SystemExit) as exit_info:
        main()
    stderr = capfd.readouterr().err
    assert exit_info.value.code == 2
    assert message in stderr
    assert stderr.startswith("miniature: ")
    assert stderr.count("\n") == 1
