"""The miniature's captions are what its build writes."""

from pathlib import Path

import pytest

from miniature.build import write_prompts

SHIPPED = Path(__file__).parents[2] / "miniature" / "prompts"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    write_prompts(folder)
    return folder


@pytest.mark.parametrize("name", ["train.txt", "validation.txt", "test.txt"])
def test_the_build_writes_what_is_shipped(written: Path, name: str) -> None:
    """Line by line."""
    assert (written / name).read_text() == (SHIPPED / name).read_text()
