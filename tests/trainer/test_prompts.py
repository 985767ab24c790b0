"""Prompt files: what counts as a prompt, and what is refused."""

from pathlib import Path

import pytest

from trainer.config import ConfigError, PromptsConfig
from trainer.prompts import clean, read_prompts, read_splits


def test_blank_lines_comments_and_repetitions_are_left_out(tmp_path: Path) -> None:
    """Order is kept, white space is one space, Unicode is composed."""
    file = tmp_path / "prompts.txt"
    file.write_text("# mine\n\n a  red\tring \ncafe\u0301\na red ring\ncaf\u00e9\nlast\n", encoding="utf-8")
    assert read_prompts(file) == ("a red ring", "caf\u00e9", "last")
    assert read_prompts(file, limit=1) == ("a red ring",)
    assert clean(["", "  "]) == ()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "no such prompt file"), (b"", "no prompt"), (b"# only\n", "no prompt"), (b"\xff\xfe", "UTF-8")],
)
def test_a_file_without_prompts_is_one_line(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    """The message names the file and what is wrong with it."""
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=complaint) as caught:
        read_prompts(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_prompt_on_both_sides_is_refused(tmp_path: Path) -> None:
    """A gain on a prompt that was trained on is no held-out gain."""
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.txt").write_text("three\nTwo\n")
    with pytest.raises(ConfigError, match="also training prompts"):
        read_splits(PromptsConfig(train=tmp_path / "a.txt", validation=tmp_path / "b.txt"))
