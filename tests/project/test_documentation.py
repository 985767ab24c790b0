"""Documentation: its commands parse, and the files, modules and make targets that it names exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer.main

from reward_service.cli import app as service_app
from trainer.cli import app as trainer_app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = {
    "reward-service": typer.main.get_command(service_app),
    "reward-trainer": typer.main.get_command(trainer_app),
}
COMMAND = re.compile(r"(?<![\w/-])(?:\.venv/bin/)?(reward-(?:service|trainer)) ([^&|()#\n]+)")
PACKAGES = "reward_service|trainer|miniature|benchmarks|tests|tools"
FOLDERS = f"{PACKAGES}|configs|deploy|docs|notebooks|prompts|requirements"
FILE = re.compile(rf"`((?:{FOLDERS})/[\w./+-]*)`")
DOTTED = re.compile(rf"(?:`|-m |^::: )((?:{PACKAGES})(?:\.\w+)+)", re.MULTILINE)
MEMBERS = re.compile(r"^::: ([\w.]+)\n(?:    .*\n)*?      members: \[(.*)\]", re.MULTILINE)
#: Old words for image, reward service and trainer; the wire type, options and captions keep theirs.
OLD_WORDS = re.compile(r"\b(judges?|learners?|pictures?)\b", re.IGNORECASE)
KEPT = re.compile(r"--judge|`judge`|name: judge|pictures=|Picture\]|\| a picture of")


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def shell_lines(page: Path) -> Iterator[str]:
    """Yield the commands of a page's shell blocks, continuation lines joined."""
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        yield from block.replace("\\\n", " ").splitlines()


def parse(program: str, arguments: list[str]) -> None:
    """Parse a command line as the program does, without running it.

    Raises:
        click.UsageError: an unknown command or option, or a missing argument
    """
    command, name = PROGRAMS[program], program
    while hasattr(command, "commands"):
        name = arguments.pop(0)
        found = command.commands.get(name)
        assert found is not None, f"{program} has no command {name}"
        command = found
    command.make_context(name, arguments)


COMMANDS = sorted(
    {
        (found[1], found[2].strip(), page_id(page))
        for page in PAGES
        for line in shell_lines(page)
        for found in COMMAND.finditer(line)
    }
)


@pytest.mark.parametrize(("program", "arguments", "page"), COMMANDS)
def test_commands_of_the_documentation_parse(
    program: str, arguments: str, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command can be copied: its options exist, and no required option is missing."""
    for name in ("photo.jpg", "metadata.parquet"):
        (tmp_path / name).touch()
    for link in ("configs", "miniature"):
        (tmp_path / link).symlink_to(ROOT / link)
    monkeypatch.chdir(tmp_path)
    parse(program, shlex.split(arguments.replace("...", "")))


def test_commands_are_found() -> None:
    """The pattern above matches the documentation."""
    assert len(COMMANDS) > 40


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_make_targets_of_the_documentation_exist(page: Path) -> None:
    """Targets in shell blocks and in code are in the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = re.findall(r"^make ([a-z-]+)", "\n".join(shell_lines(page)), re.MULTILINE)
    named += re.findall(r"`make ([a-z-]+)", page.read_text(encoding="utf-8"))
    assert set(named) <= targets


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_and_modules_of_the_documentation_exist(page: Path) -> None:
    """No page names a file or a module that has moved."""
    text = page.read_text(encoding="utf-8")
    missing = [name for name in FILE.findall(text) if not (ROOT / name).exists() and "NAME" not in name]
    missing += [name for name in DOTTED.findall(text) if not exists(name)]
    for module, members in MEMBERS.findall(text):
        missing += [f"{module}.{name}" for name in members.split(", ") if not exists(f"{module}.{name}")]
    assert not missing


def exists(dotted: str) -> bool:
    """Return whether a dotted name is a module, or an attribute in one by the text of its file."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:length])
        file = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
        if file.is_file():
            assert find_spec(parts[0])
            text = file.read_text(encoding="utf-8")
            return all(re.search(rf"\b{name}\b", text) for name in parts[length:])
    return False


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_documentation_uses_the_vocabulary(page: Path) -> None:
    """One word for one thing: reward service, trainer, image."""
    lines = KEPT.sub("", page.read_text(encoding="utf-8")).splitlines()
    assert [line for line in lines if OLD_WORDS.search(line)] == []


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=page_id)
def test_relative_links_name_existing_files(page: Path) -> None:
    """A relative link names a file; those inside docs/ are checked by `make docs`."""
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_readme_is_short_and_its_images_are_small() -> None:
    """A README of readable length that loads quickly."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert 130 <= len(lines) <= 180
    assert all(image.stat().st_size < 150_000 for image in (ROOT / "docs/images").iterdir())
