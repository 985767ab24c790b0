"""Layout of the repository: small folders, plain docstrings, no private names across modules."""

import ast
import re
import subprocess
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("reward_service", "trainer")
FIRST_PARTY = (*PACKAGES, "benchmarks", "miniature", "tools")
MOST_MODULES_IN_A_FOLDER, MOST_MODULES, MOST_LAYERS = 12, 140, 20
#: A first line names the thing and does not begin with a question word.
QUESTION = re.compile(r"(?:What|Who|Whose|Whom|Whether|Where|How|Why|When|Which|That|If)\b")
SPHINX = re.compile(r"^\s*:(?:param|returns?|raises|type|rtype)\b", re.MULTILINE)
#: Not counted as modules.
UNCOUNTED = ("__init__.py", "__main__.py")


@cache
def files(*folders: str) -> tuple[Path, ...]:
    """Return the Python files below some folders that git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *folders],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    return tuple(
        ROOT / name for name in sorted(set(listed)) if name.endswith(".py") and (ROOT / name).exists()
    )


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def documented(file: Path) -> Iterator[tuple[str, str]]:
    """Yield name and docstring of a module and of everything in it that has one."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "name", "the module"), text


def listed_lines(found: list[str]) -> str:
    return "\n".join(["", *found])


def test_no_folder_has_more_than_twelve_modules() -> None:
    count = Counter(file.parent for file in files(".") if file.name not in UNCOUNTED)
    crowded = [
        f"{folder.relative_to(ROOT)}: {n}" for folder, n in count.items() if n > MOST_MODULES_IN_A_FOLDER
    ]
    assert not crowded, listed_lines(crowded)


def test_packages_have_at_most_140_modules() -> None:
    assert len([file for file in files(*PACKAGES) if file.name != "__init__.py"]) <= MOST_MODULES


def test_every_module_docstring_names_its_subject() -> None:
    """A noun phrase or an imperative; tests and benchmarks too."""
    undocumented = [
        str(file.relative_to(ROOT))
        for file in files(".")
        if file.read_text(encoding="utf-8").strip() and not ast.get_docstring(tree(file))
    ]
    assert not undocumented, listed_lines(undocumented)
    questions = [
        f"{file.relative_to(ROOT)}: {text.splitlines()[0]}"
        for file in files(".")
        if (text := ast.get_docstring(tree(file))) and QUESTION.match(text)
    ]
    assert not questions, listed_lines(questions)


def test_no_docstring_of_the_packages_begins_with_a_question_word() -> None:
    questions = [
        f"{file.relative_to(ROOT)}: {name}: {text.splitlines()[0]}"
        for file in files(*PACKAGES)
        for name, text in documented(file)
        if QUESTION.match(text)
    ]
    assert not questions, listed_lines(questions)


def test_docstrings_are_in_google_style() -> None:
    """No Sphinx field lists."""
    fields = [
        f"{file.relative_to(ROOT)}: {name}"
        for file in files(".")
        for name, text in documented(file)
        if SPHINX.search(text)
    ]
    assert not fields, listed_lines(fields)


def test_no_two_classes_of_a_package_share_a_name() -> None:
    for package in PACKAGES:
        places: dict[str, list[str]] = {}
        for file in files(package):
            for node in tree(file).body:
                if isinstance(node, ast.ClassDef):
                    places.setdefault(node.name, []).append(str(file.relative_to(ROOT)))
        twice = [f"{name}: {', '.join(found)}" for name, found in places.items() if len(found) > 1]
        assert not twice, listed_lines(twice)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_uses(file: Path) -> Iterator[str]:
    """Yield uses of other first-party modules' private names, imported or as attributes of a module."""
    modules = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in FIRST_PARTY:
            yield from (f"from {node.module} import {it.name}" for it in node.names if _is_private(it.name))
            modules |= {
                it.asname or it.name
                for it in node.names
                if (ROOT / node.module.replace(".", "/") / f"{it.name}.py").exists()
            }
    for node in ast.walk(tree(file)):
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            continue
        if node.value.id in modules and _is_private(node.attr):
            yield f"{node.value.id}.{node.attr}"


def test_no_private_name_is_used_from_another_module() -> None:
    used = [f"{file.relative_to(ROOT)}: {use}" for file in files(*FIRST_PARTY) for use in private_uses(file)]
    assert not used, listed_lines(used)


@pytest.fixture(scope="module")
def contracts() -> list[dict[str, object]]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return [it for it in settings["tool"]["importlinter"]["contracts"] if it["type"] == "layers"]


def test_layer_contracts_are_exhaustive(contracts: list[dict[str, object]]) -> None:
    """import-linter reports a new module or folder that is in no layer."""
    assert {name for it in contracts for name in it["containers"]} == set(PACKAGES)  # type: ignore[union-attr]
    assert all(it.get("exhaustive") for it in contracts)
    assert sum(len(it["layers"]) for it in contracts) <= MOST_LAYERS  # type: ignore[arg-type]
