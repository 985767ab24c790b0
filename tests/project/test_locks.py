"""Agreement of the locks, the declared dependencies and the conda environment."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools.environment import locked_requirements, render

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PARTS = {"light": (), "torch": ("torch",), "service": ("service",), "ray": ("ray",), "trainer": ("trainer",)}


def read_lock(name: str) -> str:
    return (ROOT / name).read_text()


def versions(lock: str) -> dict[str, str]:
    """Return the exact versions in a lock by package name."""
    requirements = [Requirement(line) for line in locked_requirements(lock)]
    return {canonicalize_name(r.name): str(next(iter(r.specifier)).version) for r in requirements}


def declared(extras: tuple[str, ...]) -> list[Requirement]:
    """Return the requirements without extras and those of some extras, nested extras resolved."""
    found = [Requirement(line) for line in PROJECT["dependencies"]]
    for extra in extras:
        for line in PROJECT["optional-dependencies"][extra]:
            requirement = Requirement(line)
            if requirement.name == PROJECT["name"]:
                found += declared(tuple(requirement.extras))
            else:
                found.append(requirement)
    return found


ALL = versions(read_lock("requirements.lock"))


def test_lock_satisfies_every_declared_dependency():
    """A new declaration needs a new lock."""
    unmet = [
        str(r)
        for r in declared(tuple(PROJECT["optional-dependencies"]))
        if not r.specifier.contains(ALL.get(canonicalize_name(r.name), "0.dev0"), prereleases=True)
    ]
    assert unmet == []


@pytest.mark.parametrize("part_name", PARTS)
def test_partial_lock_is_complete_and_agrees_with_the_full_lock(part_name):
    """An image and the development environment have the same versions."""
    part = versions(read_lock(f"requirements/{part_name}.lock"))
    assert {canonicalize_name(r.name) for r in declared(PARTS[part_name])} <= part.keys()
    assert part.items() <= ALL.items()


def test_light_client_installs_no_torch():
    """A program that only requests scores downloads megabytes, not gigabytes."""
    light = versions(read_lock("requirements/light.lock")).keys()
    assert not light & {"torch", "torchvision", "transformers", "diffusers", "fastapi", "open-clip-torch"}


@pytest.mark.parametrize("path", ["requirements.lock", *(f"requirements/{part}.lock" for part in PARTS)])
def test_every_locked_package_carries_a_hash(path):
    """`pip install --require-hashes` works from any mirror."""
    blocks = re.split(r"\n(?=\S)", read_lock(path).strip())
    assert [b.splitlines()[0] for b in blocks if "--hash=sha256:" not in b] == []


@pytest.mark.parametrize("path", ["requirements.lock", *(f"requirements/{part}.lock" for part in PARTS)])
def test_lock_names_no_host(path):
    """The machine's own pip settings select the package index."""
    assert not re.search(r"://|--index-url|--find-links| @ ", read_lock(path))


def test_conda_environment_is_generated_from_the_lock():
    """environment.yml is up to date with requirements.lock."""
    assert (ROOT / "environment.yml").read_text() == render(read_lock("requirements.lock"))


def test_conda_environment_serves_the_notebook_and_both_programs():
    """One environment for everything, under its documented name."""
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == "rl-unclip-env"
    assert "python=3.11" in environment["dependencies"]
    pip = next(part["pip"] for part in environment["dependencies"] if isinstance(part, dict))
    names = {canonicalize_name(Requirement(line).name) for line in pip if not line.startswith("-")}
    learning = {"torch", "diffusers", "transformers", "peft", "open-clip-torch"}
    serving = {"fastapi", "uvicorn", "httpx", "pillow"}
    assert learning | serving | {"docker", "pytest", "jupyter"} <= names
