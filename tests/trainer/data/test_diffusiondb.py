"""Prompts of DiffusionDB: kept and rejected rows, the data card, damaged files, the command."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from transformers import CLIPTokenizer

from benchmarks.diffusiondb import write_metadata
from trainer.config import ConfigError, ModelSource
from trainer.data.diffusiondb import Filters, clean_text, prepare
from trainer.data.near_duplicates import near_duplicates
from trainer.data.prompts import read_prompt_set
from trainer.data.tokenizer import TokenCounter

MINIATURE = Path(__file__).parents[3] / "miniature" / "models" / "karlo"

FIELDS = {"prompt": pa.string(), "user_name": pa.string(), "prompt_nsfw": pa.float32()}


def metadata(folder: Path, rows: list[tuple[Any, Any, Any]], **types: Any) -> Path:
    columns = dict(zip(FIELDS, zip(*rows, strict=True), strict=True)) if rows else dict.fromkeys(FIELDS, ())
    table = pa.table({name: pa.array(columns[name], type=kind) for name, kind in (FIELDS | types).items()})
    parquet.write_table(table, folder / "metadata.parquet")
    return folder / "metadata.parquet"


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "trainer", "prompts", "diffusiondb", *map(str, arguments)]


LONG = " ".join(f"w{i}" for i in range(20))

ROWS = [
    ("a cat on  a mat", "ann", 0.1),
    ("a cat on a mat", "bob", 0.1),  # exact duplicate
    ("Ünïcode &amp; a\x07 bell", "bob", 0.0),
    (LONG, "ann", 0.2),
    (LONG.replace("w9", "other"), "bob", 0.2),  # near-duplicate
    ("nobody knows who", None, 0.1),
    ("nobody knows who either", "deleted_account", 0.1),
    (None, "ann", 0.1),
    (" \x00\n", "ann", 0.1),
    ("far too short"[:7], "ann", 0.1),
    ("not fit for children", "ann", 0.9),
    ("of unknown fitness here", "ann", None),
    ("of unknown fitness there", "ann", float("nan")),
    ("of impossible fitness too", "ann", 2.0),
]


def test_prepare_keeps_or_counts_every_row(tmp_path: Path) -> None:
    """A row is counted by the first filter that rejects it; the card and the file agree."""
    card = prepare(metadata(tmp_path, ROWS), tmp_path / "p.jsonl", Filters(), None)
    assert {name: count for name, count in card["left out"].items() if count} == {
        "no prompt_nsfw from 0 to 1": 3,
        "prompt_nsfw above the limit": 1,
        "no prompt": 2,
        "unknown user": 2,
        "exact duplicate": 1,
        "too few words": 1,
        "near-duplicate of one before": 1,
    }
    kept = {prompt.text: prompt.user for prompt in read_prompt_set(tmp_path / "p.jsonl")}
    assert kept == {"a cat on a mat": "ann", "Ünïcode & a bell": "bob", LONG: "ann"}
    assert card["source"]["rows"] == len(ROWS) == card["prompts"] + sum(card["left out"].values())
    assert json.loads((tmp_path / "p.card.json").read_text()) == card
    assert "CC0 1.0" in (tmp_path / "p.card.md").read_text()
    assert str(tmp_path) not in json.dumps(card)


def test_prepare_of_many_rows_has_no_near_duplicates_and_follows_the_seed(tmp_path: Path) -> None:
    """The same seed gives the same file; sample and per_user limit the prompts."""
    write_metadata(tmp_path / "metadata.parquet", 20_000, users=300)

    def prepared(name: str, **settings: Any) -> tuple[bytes, dict[str, Any]]:
        card = prepare(tmp_path / "metadata.parquet", tmp_path / name, Filters(**settings), None)
        return (tmp_path / name).read_bytes(), card

    everything, card = prepared("all.jsonl")
    prompts = read_prompt_set(tmp_path / "all.jsonl")
    assert len(prompts) == card["prompts"] > 2000
    assert len(near_duplicates([prompt.text for prompt in prompts], 0.77)) <= 0.002 * len(prompts)
    assert any(prompt.cluster for prompt in prompts)
    assert prepared("again.jsonl")[0] == everything
    some, card = prepared("some.jsonl", sample=100, per_user=2)
    assert len(some.splitlines()) == card["prompts"] == 100
    assert set(some.splitlines()) != set(prepared("s.jsonl", sample=100, per_user=2, seed=1)[0].splitlines())
    users = [prompt.user for prompt in read_prompt_set(tmp_path / "some.jsonl")]
    assert max(map(users.count, users)) <= 2


def test_prompts_with_a_common_near_duplicate_are_one_cluster(tmp_path: Path) -> None:
    """Two prompts that are near-duplicates of a third are one cluster although the third is dropped."""
    words = LONG.split()
    versions = [" ".join(words), " ".join(["x", "y", "z", *words[3:]]), " ".join(["x", *words[1:]])]
    rows = [(text, f"u{i}", 0.0) for i, text in enumerate([*versions, "something else entirely"])]
    prepare(metadata(tmp_path, rows), tmp_path / "p.jsonl", Filters(), None)
    cluster = {prompt.text: prompt.cluster for prompt in read_prompt_set(tmp_path / "p.jsonl")}
    assert cluster.keys() == {versions[0], versions[1], "something else entirely"}
    assert cluster[versions[0]] == cluster[versions[1]] is not None
    assert cluster["something else entirely"] is None


def test_anonymous_filter_keeps_prompts_of_unknown_users(tmp_path: Path) -> None:
    """Each counts as a user: the limit for one user does not apply to them."""
    rows = [(f"{a} something {b} odd", None, 0.0) for a in ("red", "blue") for b in ("very", "quite")]
    card = prepare(metadata(tmp_path, rows), tmp_path / "p.jsonl", Filters(anonymous=True, per_user=1), None)
    assert card["prompts"] == 4
    assert {prompt.user for prompt in read_prompt_set(tmp_path / "p.jsonl")} == {None}


@pytest.mark.parametrize(
    ("messy", "tidy"),
    [
        ("a &lt;b&gt; &#233; &copy", "a <b> é &copy"),
        ("rock &notanentity; roll & R&B", "rock &notanentity; roll & R&B"),
        ("cafe\u0301\u0085\x1b[31m red\r\n", "café [31m red"),
        ("日本\u3000語", "日本 語"),
        ("👩\u200d🎨 paints", "👩\u200d🎨 paints"),
    ],
)
def test_clean_text_changes_only_entities_and_invisible_characters(messy: str, tidy: str) -> None:
    """Text of any language otherwise stays as it is."""
    assert clean_text(messy) == tidy


# ------------------------------------------------------------------------------------------ tokens


def test_token_counter_agrees_with_karlos_tokenizer() -> None:
    """Counting word by word gives the tokenizer's count of the whole prompt, in any script."""
    counter, tokenizer = (
        TokenCounter.read(MINIATURE / "tokenizer"),
        CLIPTokenizer.from_pretrained(MINIATURE / "tokenizer"),
    )
    tokenizer.model_max_length = 10_000
    for text in ("a large red circle", "it's (((odd))) 8K--now::2", "日本語の絵、美しい é 🐱", "नमस्ते"):
        assert counter.count(text) == len(tokenizer(text)["input_ids"])
    assert TokenCounter.of_karlo(ModelSource(path=MINIATURE)).count("a red ring") == counter.count(
        "a red ring"
    )


def test_token_counter_of_open_clip_agrees_with_openai() -> None:
    """The vocabulary that open_clip installs gives OpenAI's own counts."""
    counter = TokenCounter.of_open_clip()
    assert counter is not None
    assert counter.count("a photo of a cat") == 7
    assert counter.count("beautiful café, naïve don't it's (((hdr:1.2))) 1920x1080 --ar 16:9") == 34


def test_prepare_rejects_prompts_with_too_many_tokens(tmp_path: Path) -> None:
    """Length is counted in tokens, not in words."""
    counter = TokenCounter.of_open_clip()
    rows = [("a photo of a cat", "ann", 0.0), ("supercalifragilistic expialidocious zyxwvutsrqp", "ann", 0.0)]
    card = prepare(metadata(tmp_path, rows), tmp_path / "p.jsonl", Filters(max_tokens=7), counter)
    assert card["left out"]["too many tokens"] == card["prompts"] == 1


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_missing_tokenizer_raises_config_error(tmp_path: Path, name: str) -> None:
    """The message names the files that the folder needs."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"not a CLIP tokenizer .*vocab\.json and merges\.txt"):
        TokenCounter.read(tmp_path / name)


# --------------------------------------------------------------------------------------- malformed


def truncated(folder: Path) -> Path:
    path = metadata(folder, ROWS)
    path.write_bytes(path.read_bytes()[:-200])
    return path


def damaged(folder: Path) -> Path:
    """Return a file with an intact footer and a damaged page."""
    path = metadata(folder, ROWS * 50)
    content = bytearray(path.read_bytes())
    content[4:400] = bytes(396)
    path.write_bytes(content)
    return path


def text_file(folder: Path) -> Path:
    (folder / "a.parquet").write_text("prompt\na cat\n")
    return folder / "a.parquet"


def missing_columns(folder: Path) -> Path:
    path = metadata(folder, ROWS)
    parquet.write_table(parquet.read_table(path).drop_columns(["user_name", "prompt_nsfw"]), path)
    return path


def repeated_column(folder: Path) -> Path:
    path = metadata(folder, ROWS)
    table = parquet.read_table(path)
    parquet.write_table(table.append_column("prompt", table.column("prompt")), path)
    return path


MALFORMED: list[tuple[Callable[[Path], Path], str]] = [
    (lambda folder: folder / "absent.parquet", "no such file"),
    (lambda folder: folder, "is a folder"),
    (text_file, "not a complete Parquet file"),
    (truncated, "not a complete Parquet file"),
    (damaged, "not a complete Parquet file"),
    (repeated_column, "several columns prompt"),
    (missing_columns, r"no column user_name, prompt_nsfw \(found prompt\)"),
    (
        lambda folder: metadata(folder, [(3, "ann", 0.1)], prompt=pa.int64()),
        "prompt is of type int64, not string",
    ),
    (lambda folder: metadata(folder, [("a", 3, 0.1)], user_name=pa.int8()), "user_name is of type int8"),
    (
        lambda folder: metadata(folder, [("a", "ann", "0.1")], prompt_nsfw=pa.string()),
        "prompt_nsfw is of type string, not floating point",
    ),
    (lambda folder: metadata(folder, []), r"none of 0 rows is left \(it is empty\)"),
    (lambda folder: metadata(folder, ROWS[7:9]), r"none of 2 rows is left \(no prompt: 2\)"),
]


@pytest.mark.parametrize(("make", "complaint"), MALFORMED)
def test_prepare_of_an_invalid_file_raises_config_error(
    tmp_path: Path, make: Callable[[Path], Path], complaint: str
) -> None:
    """The message is one line, and no file is written."""
    with pytest.raises(ConfigError, match=complaint) as caught:
        prepare(make(tmp_path), tmp_path / "p.jsonl", Filters(), None)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*p.*"))


def test_prepare_counts_text_that_is_not_utf8(tmp_path: Path) -> None:
    """One invalid row does not stop the preparation."""
    raw = pa.array([b"a fine prompt", b"\xff\xfe broken"], type=pa.binary())
    texts = pa.StringArray.from_buffers(2, *raw.buffers()[1:])
    columns = {"prompt": texts, "user_name": ["ann", "bob"], "prompt_nsfw": pa.array([0.1, 0.1])}
    parquet.write_table(pa.table(columns), tmp_path / "m.parquet")
    card = prepare(tmp_path / "m.parquet", tmp_path / "p.jsonl", Filters(), None)
    assert card["left out"]["no prompt"] == card["prompts"] == 1


# ----------------------------------------------------------------------------------------- command


def test_command_prepares_without_importing_torch(tmp_path: Path) -> None:
    """The command prints the counts and the path of the card, and needs no network."""
    code = (
        "import sys\nfrom trainer.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules\n"
    )
    source, out = metadata(tmp_path, ROWS), tmp_path / "p.jsonl"
    arguments = ["prompts", "diffusiondb", "--metadata", source, "--out", out, "--sample", "2", "--seed", "3"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], check=True, capture_output=True, text=True
    )
    assert "2 prompts" in done.stdout
    assert str(tmp_path / "p.card.md") in done.stdout
    assert len(read_prompt_set(out)) == 2


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--out", "p.txt", "--metadata", "m"], "ends in .jsonl"),
        (["--out", "absent/p.jsonl", "--metadata", "m"], "folder"),
        (["--out", "p.jsonl", "--metadata", "m", "--revision", "main"], "--revision"),
        (["--out", "p.jsonl", "--metadata", "m", "--tokenizer", "t", "--config", "c"], "one of the two"),
        (["--out", "p.jsonl", "--metadata", "absent.parquet"], "no such file"),
        (["--out", "p.jsonl", "--sample", "0"], "sample"),
        (["--out", "p.jsonl", "--revision", "main"], "cannot download metadata.parquet at revision main"),
    ],
)
def test_command_with_invalid_arguments_prints_one_line(
    tmp_path: Path, arguments: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exit code is 2, without a traceback, even if the hub is unreachable."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    done = subprocess.run(command(*arguments), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1


def test_killed_command_leaves_the_old_file_intact(tmp_path: Path) -> None:
    """A SIGKILL during the preparation does not damage an existing file."""
    write_metadata(tmp_path / "metadata.parquet", 20_000, users=300)
    out = tmp_path / "p.jsonl"
    out.write_text('"an older prompt"\n')
    process = subprocess.Popen(command("--metadata", tmp_path / "metadata.parquet", "--out", out))
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert out.read_text() == '"an older prompt"\n'
