"""Splits: groups are never parted, the same seed deals the same, and leaks are refused."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.config import ConfigError, PromptsConfig
from trainer.data.near_duplicates import jaccard
from trainer.data.prompts import Prompt
from trainer.data.splits import ExperimentSplits, check_leaks, experiment_splits, read_splits
from trainer.runtime.errors import LeakError

ROOT = Path(__file__).parents[3]
WORDS = [f"{a}{b}" for a in ("ka", "lo", "mi", "ru", "te", "vo", "zy") for b in "bdfgklmnprst"]
NEAR = ("a b c d e f g h i j k l m n", "a b c d e f g X i j k l m n")  # similarity 0.81


def texts(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.sample(WORDS, 6)) for _ in range(count)]


def write(path: Path, prompts: list[Any]) -> Path:
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    return path


def owned(count: int, users: int, seed: int = 0) -> list[dict[str, str]]:
    return [{"prompt": text, "user": f"u{i % users}"} for i, text in enumerate(texts(count, seed))]


def config(folder: Path, train: list[Any], **others: Any) -> PromptsConfig:
    files = {
        name: write(folder / f"{name}.jsonl", value)
        for name, value in others.items()
        if isinstance(value, list)
    }
    return PromptsConfig(train=write(folder / "train.jsonl", train), **(others | files))


# ------------------------------------------------------------------------------------ train/validation


def test_two_files_are_two_sides(tmp_path: Path) -> None:
    """Order is that of the files; every validation prompt has its group, near-duplicates the same."""
    split = read_splits(config(tmp_path, texts(3), validation=["one owl", NEAR[0], "two owls", NEAR[1]]))
    assert split.train == tuple(texts(3))
    assert split.validation == ("one owl", NEAR[0], "two owls", NEAR[1])
    assert split.groups == (0, 1, 2, 1)


def test_one_file_is_divided_by_groups(tmp_path: Path) -> None:
    """A share of the users is held out, whole."""
    prompts = owned(60, users=10)
    split = read_splits(config(tmp_path, prompts, validation_share=0.3), seed=4)
    user = {prompt["prompt"]: prompt["user"] for prompt in prompts}
    held = {user[text] for text in split.validation}
    assert len(held) == 3
    assert held.isdisjoint(user[text] for text in split.train)
    assert len(split.train) + len(split.validation) == 60
    assert len(set(split.groups)) == 3


@pytest.mark.parametrize(
    ("train", "validation", "complaint"),
    [
        (
            ["An owl!", "x"],
            ["an  owl"],
            "'An owl!' in .*train.jsonl and 'an owl' in .*validation.jsonl are the same",
        ),
        ([NEAR[0]], ["y", NEAR[1]], r"similarity 0\.81"),
        (
            [{"prompt": "x", "user": "ann"}],
            [{"prompt": "y", "user_name": "ann"}],
            "user 'ann' is on two sides",
        ),
        ([{"prompt": "x", "cluster": 1}], [{"prompt": "y", "cluster": "1"}], "cluster '1' is on two sides"),
    ],
)
def test_files_that_overlap_are_refused(
    tmp_path: Path, train: list[Any], validation: list[Any], complaint: str
) -> None:
    """In one line that names both prompts and both files: a gain on what was trained on is none."""
    with pytest.raises(LeakError, match=complaint) as caught:
        read_splits(config(tmp_path, train, validation=validation))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("train", "complaint"),
    [
        (["one"], "1 prompts in 1 groups"),
        (owned(20, users=1), "tied most by user 'u0'"),
        ([{"prompt": text, "cluster": "c"} for text in texts(9)] + ["x"], "tied most by cluster 'c'"),
        ([NEAR[0], NEAR[1]], "tied most by near-duplicates"),
    ],
)
def test_what_cannot_be_divided_is_refused(tmp_path: Path, train: list[Any], complaint: str) -> None:
    """The message says what ties the prompts together."""
    with pytest.raises(ConfigError, match=complaint):
        read_splits(config(tmp_path, train))


def test_a_share_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    """In one line, not with scikit-learn's words."""
    with pytest.raises(ConfigError, match=r"validation_share: 0\.9 of 2 groups"):
        read_splits(config(tmp_path, ["one owl", "two cats"], validation_share=0.9))


# ------------------------------------------------------------------------------------------- folds


def test_folds_keep_users_and_near_duplicates_together(tmp_path: Path) -> None:
    """Each prompt is validated once and tested never; folds are of about the same size."""
    prompts = [*owned(90, users=15), *({"prompt": text} for text in NEAR)]
    splits = experiment_splits(config(tmp_path, prompts, validation=["an owl"], test_share=0.2), 3, seed=1)
    splits.check_leaks()
    pool = [text for k in range(3) for text in splits.fold(k).validation]
    assert sorted([*pool, *splits.final().validation]) == sorted(
        ["an owl", *(prompt["prompt"] for prompt in prompts)]
    )
    assert max(map(len, splits.folds)) - min(map(len, splits.folds)) <= 6
    for k in range(3):
        train, validation, groups = splits.fold(k)
        assert not set(train) & set(validation)
        assert len(groups) == len(validation)
        assert len(train) + len(validation) == len(pool)
    assert (
        splits.final().train
        == splits.fold(0).validation + splits.fold(1).validation + splits.fold(2).validation
    )


def test_the_seed_alone_decides(tmp_path: Path) -> None:
    """Not the order of the lines; another seed deals otherwise."""
    prompts = owned(60, users=12)
    shuffled = random.Random(3).sample(prompts, len(prompts))

    def sides(rows: list[Any], seed: int) -> list[set[Prompt]]:
        splits = experiment_splits(config(tmp_path, rows), 4, seed)
        return [*map(set, splits.folds), set(splits.test)]

    assert sides(prompts, 7) == sides(shuffled, 7)
    assert sides(prompts, 7) != sides(prompts, 8)
    assert sides(prompts, 2**70)  # any seed that the configuration allows


def test_too_few_groups_for_the_folds_is_refused(tmp_path: Path) -> None:
    """The message counts them."""
    with pytest.raises(ConfigError, match=r"3 groups .* of crossval.folds \(5 needed\)"):
        experiment_splits(config(tmp_path, owned(30, users=3), test=["an owl"]), 5)


def test_a_giant_group_is_refused(tmp_path: Path) -> None:
    """One user who wrote nearly everything leaves nothing to hold out."""
    prompts = [*owned(80, users=1), *texts(20, seed=5)]
    with pytest.raises(ConfigError, match="largest group holds 80, tied most by user 'u0'"):
        experiment_splits(config(tmp_path, prompts, test=["an owl"]), 3)


@pytest.mark.parametrize("side", ["train", "validation"])
def test_a_test_file_that_overlaps_is_refused(tmp_path: Path, side: str) -> None:
    """With either of the other files."""
    files = {"train": texts(20), "validation": texts(10, seed=9), "test": ["an owl", NEAR[1]]}
    files[side] = [*files[side], NEAR[0]]
    with pytest.raises(LeakError, match=f"{side}.jsonl and .*test.jsonl"):
        experiment_splits(config(tmp_path, **files), 3)


# -------------------------------------------------------------------------------------------- file


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, PromptsConfig]:
    """splits.json of prompts by twelve users, and what it was made of."""
    prompts = config(tmp_path, [*owned(60, users=12), {"prompt": "é\u2028“quoted” \\ 猫"}])
    splits = experiment_splits(prompts, 3, seed=0)
    splits.save(tmp_path / "splits.json")
    assert ExperimentSplits.load(tmp_path / "splits.json", prompts) == splits
    return tmp_path / "splits.json", prompts


def test_a_prompt_is_a_line_of_the_file(saved: tuple[Path, PromptsConfig]) -> None:
    """So that a person can read it; and what is loaded splits as what was saved."""
    path, prompts = saved
    splits = experiment_splits(prompts, 3, seed=0)
    assert sum('"prompt"' in line for line in path.read_text().splitlines()) == 61
    loaded = ExperimentSplits.load(path, prompts)
    assert [loaded.fold(k) for k in range(3)] == [splits.fold(k) for k in range(3)]
    assert loaded.final() == splits.final()


def copied(kept: dict[str, Any]) -> None:
    kept["folds"][1].append(kept["folds"][0][0])


def nearly_copied(kept: dict[str, Any]) -> None:
    kept["folds"][0].append({"prompt": NEAR[0], "user": None, "cluster": None, "group": 900})
    kept["folds"][2].append({"prompt": NEAR[1], "user": None, "cluster": None, "group": 901})


def put_to_test(kept: dict[str, Any]) -> None:
    kept["test"].append({"prompt": kept["folds"][2][0]["prompt"].upper() + "!"})


def moved(kept: dict[str, Any]) -> None:
    row = next(row for row in kept["folds"][0] if row["user"])
    kept["folds"][0].remove(row)
    kept["folds"][1].append(row | {"group": 900})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (copied, "in fold 0 and .* in fold 1 are the same prompt"),
        (nearly_copied, "in fold 0 and .* in fold 2 are near-duplicates .similarity 0.81"),
        (put_to_test, "in fold 2 and .* in test are the same prompt"),
        (moved, "user 'u.*' is on two sides: .* in fold 0 and .* in fold 1"),
    ],
)
def test_a_planted_leak_is_refused(
    saved: tuple[Path, PromptsConfig], change: Callable[[dict[str, Any]], object], complaint: str
) -> None:
    """What counts is what the prompts say: group numbers in the file do not hide it."""
    path, prompts = saved
    kept = json.loads(path.read_text())
    change(kept)
    path.write_text(json.dumps(kept))
    with pytest.raises(LeakError, match=complaint) as caught:
        ExperimentSplits.load(path, prompts)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda kept: kept.pop("test"), "test is missing"),
        (lambda kept: kept.pop("folds"), "folds is missing"),
        (lambda kept: kept.update(format="other"), "its format is not"),
        (lambda kept: kept.update(test=[]), "test holds no prompts"),
        (lambda kept: kept.update(folds=kept["folds"][:1]), "fewer than two folds"),
        (lambda kept: kept["folds"].append([]), "fold 3 holds no prompts"),
        (lambda kept: kept["folds"].append("cat"), "fold 3 holds no prompts"),
        (lambda kept: kept["folds"][1][0].pop("prompt"), "prompt 1 of fold 1 is no"),
        (lambda kept: kept["folds"][1][0].update(prompt=" "), "prompt 1 of fold 1 is empty"),
        (lambda kept: kept["folds"][1].append(kept["folds"][1][0]), "fold 1 is there twice"),
        (lambda kept: kept["test"][0].update(user=3), "prompt 1 of test: user and cluster"),
    ],
)
def test_a_file_that_was_spoilt_is_one_line(
    saved: tuple[Path, PromptsConfig], change: Callable[[dict[str, Any]], object], complaint: str
) -> None:
    """Before any model is loaded."""
    path, prompts = saved
    kept = json.loads(path.read_text())
    change(kept)
    path.write_text(json.dumps(kept))
    with pytest.raises(ConfigError, match=complaint) as caught:
        ExperimentSplits.load(path, prompts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_splits_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    """Cut short, of another kind, not text."""
    (tmp_path / "splits.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"splits\.json: "):
        ExperimentSplits.load(tmp_path / "splits.json", PromptsConfig(train=tmp_path))


def test_leaks_are_counted_and_the_closest_is_named() -> None:
    """The same prompt before one that resembles it."""
    sides = {"a": [Prompt(NEAR[0]), Prompt("an owl")], "b": [Prompt(NEAR[1]), Prompt("An owl.")]}
    with pytest.raises(LeakError, match=r"'an owl' in a and 'An owl.' in b are the same prompt \(and 1 more"):
        check_leaks(sides, 0.77)


# ------------------------------------------------------------------------------------ shipped files


@pytest.mark.parametrize("folder", ["miniature/prompts", "prompts/karlo"])
def test_the_shipped_files_are_clean(folder: str) -> None:
    """Three sides without leaks; no test or validation prompt resembles another one."""
    files = {name: ROOT / folder / f"{name}.txt" for name in ("train", "validation", "test")}
    splits = experiment_splits(PromptsConfig(**files), 3)
    splits.check_leaks()
    train, validation, groups = read_splits(PromptsConfig(**files))
    assert len(set(groups)) == len(validation)
    assert len(set(splits.final().groups)) == len(splits.test)
    assert max(jaccard(one, other) for one in splits.final().validation for other in train) < 0.77
