"""Prompt files: formats, normalization, invalid files."""

import json
from pathlib import Path

import pytest

from trainer.config import ConfigError
from trainer.data.prompts import Prompt, normalize_prompts, read_prompt_set, read_prompts


def write(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def test_text_file_skips_blank_lines_comments_and_repetitions(tmp_path: Path) -> None:
    """The order is kept; white space becomes one space, and Unicode is composed."""
    file = write(
        tmp_path, "prompts.txt", "# mine\n\n a  red\tring \ncafe\u0301\na red ring\ncaf\u00e9\nlast\n"
    )
    assert read_prompts(file) == ("a red ring", "caf\u00e9", "last")
    assert read_prompts(file, limit=1) == ("a red ring",)
    assert normalize_prompts(["", "  "]) == ()


def test_csv_file_has_users_and_clusters(tmp_path: Path) -> None:
    """Quoted commas and line ends are part of the prompt; other columns and blank fields are ignored."""
    file = write(
        tmp_path,
        "p.CSV",
        '\ufeffcluster, Prompt ,user_name,likes\r\n7,"a cat, ""big""\r\nand red",ann,3\r\n,dog,,\r\n\r\n',
    )
    assert read_prompt_set(file) == (Prompt('a cat, "big" and red', "ann", "7"), Prompt("dog"))


def test_json_lines_are_objects_or_strings(tmp_path: Path) -> None:
    """A line separator inside a string is white space, not the end of a line; whole numbers name clusters."""
    rows = [{"prompt": "a\u2028cat", "user": " ann "}, "dog", {"prompt": "owl", "cluster": 3, "user": None}]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    assert read_prompt_set(write(tmp_path, "p.jsonl", text)) == (
        Prompt("a cat", "ann"),
        Prompt("dog"),
        Prompt("owl", None, "3"),
    )


MALFORMED = [
    ("a.txt", b"", "no prompt"),
    ("a.txt", b"# only\n", "no prompt"),
    ("a.txt", b"fine\n\xff\xfe\n", "line 2: not UTF-8"),
    ("a.txt", "cat".encode("utf-16"), "line 1: not UTF-8"),
    ("a.txt", b"cat\nd\0g", r"line 2: .*U\+0000"),
    ("a.parquet", b"PAR1", "parquet is not a supported format"),
    ("prompts", b"cat", "no suffix is not a supported format"),
    ("a.csv", b"", "line 1: no column prompt"),
    ("a.csv", b"prompt,user\n", "no prompt"),
    ("a.csv", b"text,user\ncat,ann", "line 1: no column prompt"),
    ("a.csv", b"prompt,prompt\ncat,dog", "line 1: several columns prompt"),
    ("a.csv", b"prompt,user,user_name\ncat,a,b", "line 1: several columns user"),
    ("a.csv", b"prompt\ncat\na dog, sitting\n", "line 3: 2 fields.* the header has 1"),
    ("a.csv", b'prompt\ncat\n"a dog\n', "line 3: invalid CSV"),
    ("a.csv", b"prompt\n" + b"x" * 200_000, "line 2: invalid CSV .*131,072"),
    ("a.csv", b"prompt;user\ncat;ann\n", "line 1: the separator is a comma, not a semicolon"),
    ("a.csv", b'"User"\t"Prompt"\nann\tcat\n', "line 1: the separator is a comma, not a tab"),
    ("a.csv", b'prompt,user\n"a\nb",ann\n\nc\n', "line 5: 1 fields"),
    ("a.jsonl", b'"cat"\n{"prompt": \n', "line 2: invalid JSON"),
    ("a.jsonl", b"[" * 100_000, "line 1: invalid JSON"),
    ("a.jsonl", b'"cat"\n{"prompt": "a", "prompt": "b"}', "line 2: .*the key 'prompt' is there twice"),
    ("a.jsonl", b'{"text": "cat"}', "line 1: no key prompt"),
    ("a.jsonl", b'"cat"\n["dog"]', "line 2: a list"),
    ("a.jsonl", b'{"prompt": 3}', "line 1: the prompt is a number"),
    ("a.jsonl", b'{"prompt": null}', "line 1: the prompt is null"),
    ("a.jsonl", b'{"prompt": "cat", "user": ["ann"]}', "line 1: the user is a list"),
    ("a.jsonl", b'{"prompt": "cat", "user": true}', "line 1: the user is true or false"),
    ("a.jsonl", b'{"prompt": "cat", "user": "a", "user_name": "b"}', "line 1: several keys"),
    ("a.jsonl", b'{"prompt": "cat \\ud800"}', r"line 1: .*U\+D800"),
    ("a.jsonl", b'{"prompt": "cat", "cluster": "\\u0000"}', r"line 1: the cluster .*U\+0000"),
]


@pytest.mark.parametrize(("name", "content", "complaint"), MALFORMED)
def test_malformed_file_raises_config_error(
    tmp_path: Path, name: str, content: bytes, complaint: str
) -> None:
    """The message is one line that names the file, the line and the problem."""
    file = write(tmp_path, name, content)
    with pytest.raises(ConfigError, match=complaint) as caught:
        read_prompt_set(file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def test_missing_file_or_folder_raises_config_error(tmp_path: Path) -> None:
    """Both messages are one line."""
    (tmp_path / "folder.txt").mkdir()
    for name, complaint in (("absent.txt", "no such prompt file"), ("folder.txt", "is a folder")):
        with pytest.raises(ConfigError, match=complaint):
            read_prompts(tmp_path / name)
