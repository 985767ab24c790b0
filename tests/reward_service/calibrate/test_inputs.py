"""Lists of images and choices as people write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from reward_service.calibrate.inputs import check_files, read_choices, read_images
from reward_service.settings import ConfigError


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_csv_and_jsonl_say_the_same(tmp_path: Path) -> None:
    """A byte order mark, quotes, line ends inside them, further columns and blank lines included."""
    table = written(
        tmp_path,
        "a.csv",
        '\ufeff,image,seed,prompt\r\n0,a.png,7,"a cat, ""red""\non grass"\r\n1,b.png,,x\r\n',
    )
    lines = written(
        tmp_path,
        "a.jsonl",
        '{"image": "a.png", "prompt": "a cat, \\"red\\"\\non grass"}\n\n{"prompt": "x", "image": "b.png"}\n',
    )
    one, other = read_images(table), read_images(lines)
    assert [row.key for row in one] == [row.key for row in other]
    assert one[0].prompt == one[0].group == 'a cat, "red"\non grass'


def test_groups_have_the_prompts_text_or_an_id(tmp_path: Path) -> None:
    """A number is an id too."""
    rows = '{"image": "a", "prompt": "x", "prompt_id": 7}\n{"image": "b", "prompt": "x", "prompt_id": null}\n'
    assert [row.group for row in read_images(written(tmp_path, "a.jsonl", rows))] == ["7", "x"]


def test_the_suffix_or_the_option_names_the_format(tmp_path: Path) -> None:
    """And nothing is guessed."""
    path = written(tmp_path, "list.txt", "image,prompt\na,x\n")
    assert len(read_images(path, "csv")) == 1
    with pytest.raises(ConfigError, match="--format"):
        read_images(path)


def test_choices_may_weigh(tmp_path: Path) -> None:
    """1 where nothing is said."""
    rows = "prompt,preferred,rejected,weight\nx,a,b,\nx,b,c,2.5\n"
    found = read_choices(written(tmp_path, "pairs.csv", rows))
    assert [choice.weight for choice in found] == [1.0, 2.5]
    assert (found[1].preferred.image, found[1].rejected.image) == ("b", "c")


MISTAKES = {
    "columns": ("a.csv", "picture,text\na,x\n", "no column image and prompt"),
    "empty file": ("a.csv", "", "no column image"),
    "no rows": ("a.csv", "image,prompt\n", "holds no rows"),
    "empty prompt": ("a.csv", "image,prompt\na,x\nb,\n", "line 3: prompt is empty"),
    "blank prompt": ("a.csv", 'image,prompt\na,"  "\n', "line 2: prompt"),
    "unquoted comma": ("a.csv", "image,prompt\na,a cat, red\n", "line 2: expected 2 fields"),
    "short row": ("a.csv", "image,prompt\na\n", "line 2: expected 2 fields"),
    "open quote": ("a.csv", 'image,prompt\na,"x\n', "not CSV"),
    "repeated": ("a.csv", "image,prompt\na,x\nb,x\na,x\n", "line 4 repeats line 2"),
    "not UTF-8": ("a.csv", b"image,prompt\na,caf\xe9\n", "UTF-8"),
    "long prompt": ("a.csv", "image,prompt\na," + 10_001 * "x" + "\n", "at most 10000"),
    "broken JSON": ("a.jsonl", '{"image": "a", "prompt": "x"}\n{"image"\n', "line 2: not JSON"),
    "no object": ("a.jsonl", '["a", "x"]\n', "line 1: expected a JSON object"),
    "missing key": ("a.jsonl", '{"image": "a"}\n', "line 1: no prompt"),
    "no text": ("a.jsonl", '{"image": "a", "prompt": 5}\n', "line 1: prompt is no text"),
    "half a character": ("a.jsonl", '{"image": "a", "prompt": "\\ud800"}\n', "line 1: prompt holds half"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_name_file_and_line(name: str, tmp_path: Path) -> None:
    """In one line."""
    file, content, words = MISTAKES[name]
    path = written(tmp_path, file, content)
    with pytest.raises(ConfigError, match=words) as caught:
        read_images(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("x,a,a,1", "both a"),
        ("x,a,b,0", "number above 0"),
        ("x,a,b,nan", "number above 0"),
        ("x,a,b,much", "number above 0"),
        ("x,a,b,1e308", "from 1e-06 to 1e\\+06"),
        ("x,,b,1", "preferred is empty"),
    ],
)
def test_unusable_choices_are_refused(row: str, words: str, tmp_path: Path) -> None:
    """With their line."""
    path = written(tmp_path, "pairs.csv", f"prompt,preferred,rejected,weight\n{row}\n")
    with pytest.raises(ConfigError, match=f"line 2: .*{words}"):
        read_choices(path)


def test_missing_images_are_all_counted(tmp_path: Path) -> None:
    """And the first few named, with their lines."""
    rows = "".join(f"{name}.png,x\n" for name in "abcdef")
    path = written(tmp_path, "a.csv", "image,prompt\n" + rows)
    (tmp_path / "b.png").touch()
    with pytest.raises(ConfigError) as caught:
        check_files(tmp_path, read_images(path), path)
    message = str(caught.value)
    assert "5 of 6 images" in message
    assert "a.png (line 2), c.png (line 4), d.png (line 5) ..." in message


def test_a_name_that_no_file_can_have_is_a_missing_image(tmp_path: Path) -> None:
    """Too long a one is no error of its own, and is not told whole."""
    path = written(tmp_path, "a.csv", f"image,prompt\n{5000 * 'a'},x\n")
    with pytest.raises(ConfigError, match=r"1 of 1 images are not in .*a \(line 2\)") as caught:
        check_files(tmp_path, read_images(path), path)
    assert len(str(caught.value)) < 1000


def test_a_weight_beyond_any_number_is_refused(tmp_path: Path) -> None:
    """JSON has integers of any size."""
    row = f'{{"prompt": "x", "preferred": "a", "rejected": "b", "weight": 1{400 * "0"}}}\n'
    with pytest.raises(ConfigError, match="line 1: weight is"):
        read_choices(written(tmp_path, "pairs.jsonl", row))
