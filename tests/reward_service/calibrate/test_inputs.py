"""Input files of a calibration: lists of images and preferences."""

from __future__ import annotations

from pathlib import Path

import pytest

from reward_service.calibrate.inputs import check_images_exist, read_images, read_preferences
from reward_service.settings import ConfigError
from trainer.data.prompts import read_prompts


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_csv_and_jsonl_give_the_same_rows(tmp_path: Path) -> None:
    """Byte order marks, quotes, quoted line ends, other columns and blank lines are supported."""
    table = write(
        tmp_path,
        "a.csv",
        '\ufeff,image,seed,prompt\r\n0,a.png,7,"a cat, ""red""\non grass"\r\n1,b.png,,x\r\n',
    )
    lines = write(
        tmp_path,
        "a.jsonl",
        '{"image": "a.png", "prompt": "a cat, \\"red\\"\\non grass"}\n\n{"prompt": "x", "image": "b.png"}\n',
    )
    one, other = read_images(table), read_images(lines)
    assert [row.key for row in one] == [row.key for row in other]
    assert one[0].prompt == one[0].group == 'a cat, "red"\non grass'


def test_headers_are_those_of_the_trainer(tmp_path: Path) -> None:
    """Capital letters and spaces around a column's name do not matter, in either program."""
    table = write(tmp_path, "a.csv", "Prompt , IMAGE\nx,a.png\n")
    assert [row.key for row in read_images(table)] == [("x", "a.png")]
    assert read_prompts(table) == ("x",)


def test_a_group_is_the_prompt_id_or_the_prompt(tmp_path: Path) -> None:
    """A numeric prompt_id is accepted; null means the prompt's text."""
    rows = '{"image": "a", "prompt": "x", "prompt_id": 7}\n{"image": "b", "prompt": "x", "prompt_id": null}\n'
    assert [row.group for row in read_images(write(tmp_path, "a.jsonl", rows))] == ["7", "x"]


def test_the_format_comes_from_the_suffix_or_the_option(tmp_path: Path) -> None:
    """An unknown suffix without the option is an error; nothing is guessed."""
    path = write(tmp_path, "list.txt", "image,prompt\na,x\n")
    assert len(read_images(path, "csv")) == 1
    with pytest.raises(ConfigError, match="--format"):
        read_images(path)


def test_preferences_may_have_weights(tmp_path: Path) -> None:
    """An empty weight means 1."""
    rows = "prompt,preferred,rejected,weight\nx,a,b,\nx,b,c,2.5\n"
    pairs = read_preferences(write(tmp_path, "pairs.csv", rows))
    assert [pair.weight for pair in pairs] == [1.0, 2.5]
    assert (pairs[1].preferred.image, pairs[1].rejected.image) == ("b", "c")


MISTAKES = {
    "columns": ("a.csv", "file,text\na,x\n", "no column image and prompt"),
    "empty file": ("a.csv", "", "no column image"),
    "semicolons": ("a.csv", "image;prompt\na;x\n", "line 1: the separator is a comma, not a semicolon"),
    "two columns": ("a.csv", "image,prompt,Prompt\na,x,y\n", "line 1: several columns prompt"),
    "after a quoted line end": ("a.csv", 'image,prompt\na,"x\ny"\nb\n', "line 4: expected 2 fields"),
    "with a quoted line end": ("a.csv", 'image,prompt\na,x\n,"x\ny"\n', "line 3: image is empty"),
    "no rows": ("a.csv", "image,prompt\n", "no rows"),
    "empty prompt": ("a.csv", "image,prompt\na,x\nb,\n", "line 3: prompt is empty"),
    "blank prompt": ("a.csv", 'image,prompt\na,"  "\n', "line 2: prompt"),
    "unquoted comma": ("a.csv", "image,prompt\na,a cat, red\n", "line 2: expected 2 fields"),
    "short row": ("a.csv", "image,prompt\na\n", "line 2: expected 2 fields"),
    "open quote": ("a.csv", 'image,prompt\na,"x\n', "not CSV"),
    "repeated": ("a.csv", "image,prompt\na,x\nb,x\na,x\n", "line 4 repeats line 2"),
    "not UTF-8": ("a.csv", b"image,prompt\na,caf\xe9\n", "UTF-8"),
    "long prompt": ("a.csv", "image,prompt\na," + 10_001 * "x" + "\n", "at most 10000"),
    "broken JSON": ("a.jsonl", '{"image": "a", "prompt": "x"}\n{"image"\n', "line 2: not JSON"),
    "not an object": ("a.jsonl", '["a", "x"]\n', "line 1: expected a JSON object"),
    "missing key": ("a.jsonl", '{"image": "a"}\n', "line 1: no prompt"),
    "not text": ("a.jsonl", '{"image": "a", "prompt": 5}\n', "line 1: prompt is not text"),
    "lone surrogate": (
        "a.jsonl",
        '{"image": "a", "prompt": "\\ud800"}\n',
        "line 1: prompt contains a lone surrogate",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_invalid_files_are_reported_with_file_and_line(name: str, tmp_path: Path) -> None:
    """The error is one line with the path and, if there is one, the line number."""
    file, content, message = MISTAKES[name]
    path = write(tmp_path, file, content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_images(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("x,a,a,1", "both a"),
        ("x,a,b,0", "number above 0"),
        ("x,a,b,nan", "number above 0"),
        ("x,a,b,much", "number above 0"),
        ("x,a,b,1e308", "from 1e-06 to 1e\\+06"),
        ("x,,b,1", "preferred is empty"),
    ],
)
def test_invalid_preferences_are_refused(row: str, message: str, tmp_path: Path) -> None:
    """The error gives the line number and the cause."""
    path = write(tmp_path, "pairs.csv", f"prompt,preferred,rejected,weight\n{row}\n")
    with pytest.raises(ConfigError, match=f"line 2: .*{message}"):
        read_preferences(path)


def test_missing_images_are_counted(tmp_path: Path) -> None:
    """The error counts all missing images and names the first three with their lines."""
    rows = "".join(f"{name}.png,x\n" for name in "abcdef")
    path = write(tmp_path, "a.csv", "image,prompt\n" + rows)
    (tmp_path / "b.png").touch()
    with pytest.raises(ConfigError) as caught:
        check_images_exist(tmp_path, read_images(path), path)
    error = str(caught.value)
    assert "5 of 6 images" in error
    assert "a.png (line 2), c.png (line 4), d.png (line 5) ..." in error


def test_a_too_long_file_name_is_a_missing_image(tmp_path: Path) -> None:
    """A name that the file system refuses counts as missing, and is shortened in the error."""
    path = write(tmp_path, "a.csv", f"image,prompt\n{5000 * 'a'},x\n")
    with pytest.raises(ConfigError, match=r"1 of 1 images are not in .*a \(line 2\)") as caught:
        check_images_exist(tmp_path, read_images(path), path)
    assert len(str(caught.value)) < 1000


def test_an_overflowing_weight_is_refused(tmp_path: Path) -> None:
    """JSON allows integers that no float can represent."""
    row = f'{{"prompt": "x", "preferred": "a", "rejected": "b", "weight": 1{400 * "0"}}}\n'
    with pytest.raises(ConfigError, match="line 1: weight is"):
        read_preferences(write(tmp_path, "pairs.jsonl", row))
