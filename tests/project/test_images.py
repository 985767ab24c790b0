"""Guarantees of the two Dockerfiles that can be checked without an engine."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = ("Dockerfile.reward", "Dockerfile.trainer")


def instructions(name: str) -> list[str]:
    """Return the lines of a Dockerfile without comments."""
    return [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]


def test_both_images_begin_with_the_same_layers():
    """The large torch layer is built, stored and pulled once."""
    heads = [lines[: next(i for i, x in enumerate(lines) if "torch.lock" in x and "RUN" in x) + 1]
             for lines in map(instructions, FILES)]  # fmt: skip
    assert heads[0] == heads[1]


@pytest.mark.parametrize("name", FILES)
def test_image_does_not_run_as_root(name):
    """An attacker who takes over the process is an unprivileged user."""
    assert [line for line in instructions(name) if line.startswith("USER ")][-1] == "USER lab"


@pytest.mark.parametrize("name", FILES)
def test_code_comes_after_every_installation(name):
    """A change of code rebuilds in seconds."""
    lines = instructions(name)
    last_install = max(i for i, line in enumerate(lines) if "pip install" in line)
    first_code = min(i for i, line in enumerate(lines) if line.startswith("COPY") and ".lock" not in line)
    assert last_install < first_code


@pytest.mark.parametrize("name", FILES)
def test_base_image_can_be_replaced(name):
    """Sites with their own base image build with --build-arg BASE_IMAGE."""
    assert "ARG BASE_IMAGE=python:3.11-slim" in instructions(name)
