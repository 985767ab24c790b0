"""Committed prompts of the miniature equal those of its build."""

from pathlib import Path

import pytest

from miniature.build import write_prompts

COMMITTED = Path(__file__).parents[2] / "miniature" / "prompts"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    write_prompts(folder)
    return folder


@pytest.mark.parametrize("name", ["train.txt", "validation.txt", "test.txt"])
def test_build_writes_the_committed_prompts(written: Path, name: str) -> None:
    """Byte for byte."""
    assert (written / name).read_text() == (COMMITTED / name).read_text()
