"""Splits: whole groups, reproducible by the seed, no leaks; splits.json."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.config import ConfigError, PromptsConfig
from trainer.data import near_duplicates
from trainer.data.near_duplicates import NearDuplicates, jaccard
from trainer.data.prompts import Prompt
from trainer.data.splits import ExperimentSplits, check_leaks, experiment_splits, read_splits
from trainer.runtime.errors import LeakError

ROOT = Path(__file__).parents[3]
WORDS = [f"{a}{b}" for a in ("ka", "lo", "mi", "ru", "te", "vo", "zy") for b in "bdfgklmnprst"]
NEAR = ("a b c d e f g h i j k l m n", "a b c d e f g X i j k l m n")  # similarity 0.81


def texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.sample(WORDS, 6)) for _ in range(count)]


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


def test_read_splits_of_two_files(tmp_path: Path) -> None:
    """The order is that of the files; near-duplicates among validation prompts are one group."""
    split = read_splits(config(tmp_path, texts(3), validation=["one owl", NEAR[0], "two owls", NEAR[1]]))
    assert split.train == tuple(texts(3))
    assert split.validation == ("one owl", NEAR[0], "two owls", NEAR[1])
    assert split.groups == (0, 1, 2, 1)


def test_read_splits_of_one_file_holds_out_whole_groups(tmp_path: Path) -> None:
    """A share of the users is held out, each with all prompts."""
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
def test_overlapping_files_raise_leak_error(
    tmp_path: Path, train: list[Any], validation: list[Any], complaint: str
) -> None:
    """The message is one line that names both prompts and both files."""
    with pytest.raises(LeakError, match=complaint) as caught:
        read_splits(config(tmp_path, train, validation=validation))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("train", "complaint"),
    [
        (["one"], "1 prompts in 1 groups"),
        (owned(20, users=1), "linked most by user 'u0'"),
        ([{"prompt": text, "cluster": "c"} for text in texts(9)] + ["x"], "linked most by cluster 'c'"),
        ([NEAR[0], NEAR[1]], "linked most by near-duplicates"),
    ],
)
def test_prompts_in_one_group_cannot_be_split(tmp_path: Path, train: list[Any], complaint: str) -> None:
    """The message names the reason that links most of the prompts."""
    with pytest.raises(ConfigError, match=complaint):
        read_splits(config(tmp_path, train))


def test_share_that_leaves_no_training_prompts_is_refused(tmp_path: Path) -> None:
    """The message names the setting instead of scikit-learn's error."""
    with pytest.raises(ConfigError, match=r"validation_share: 0\.9 of 2 groups"):
        read_splits(config(tmp_path, ["one owl", "two cats"], validation_share=0.9))


# ------------------------------------------------------------------------------------------- folds


def test_folds_contain_whole_groups(tmp_path: Path) -> None:
    """Each prompt outside the test set is in one fold; the folds have about the same size."""
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


def test_splits_depend_on_the_seed_only(tmp_path: Path) -> None:
    """The order of the lines does not matter; another seed gives other splits."""
    prompts = owned(60, users=12)
    shuffled = random.Random(3).sample(prompts, len(prompts))

    def sides(rows: list[Any], seed: int) -> list[set[Prompt]]:
        splits = experiment_splits(config(tmp_path, rows), 4, seed)
        return [*map(set, splits.folds), set(splits.test)]

    assert sides(prompts, 7) == sides(shuffled, 7)
    assert sides(prompts, 7) != sides(prompts, 8)
    assert sides(prompts, 2**70)  # any seed that the configuration allows


def test_too_few_groups_for_the_folds_are_refused(tmp_path: Path) -> None:
    """The message has both numbers."""
    with pytest.raises(ConfigError, match=r"3 groups .* for crossval.folds \(5 groups required\)"):
        experiment_splits(config(tmp_path, owned(30, users=3), test=["an owl"]), 5)


def test_group_of_most_prompts_is_refused(tmp_path: Path) -> None:
    """One user who wrote nearly all prompts leaves too few for the other folds."""
    prompts = [*owned(80, users=1), *texts(20, seed=5)]
    with pytest.raises(ConfigError, match="largest group has 80, linked most by user 'u0'"):
        experiment_splits(config(tmp_path, prompts, test=["an owl"]), 3)


@pytest.mark.parametrize("side", ["train", "validation"])
def test_overlapping_test_file_raises_leak_error(tmp_path: Path, side: str) -> None:
    """The test file must not overlap with the training file, nor with the validation file."""
    files = {"train": texts(20), "validation": texts(10, seed=9), "test": ["an owl", NEAR[1]]}
    files[side] = [*files[side], NEAR[0]]
    with pytest.raises(LeakError, match=f"{side}.jsonl and .*test.jsonl"):
        experiment_splits(config(tmp_path, **files), 3)


def test_near_duplicates_are_searched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Making, checking, saving and loading splits use the pairs of one search each."""
    searches = 0

    def counting(texts: Any, threshold: float) -> Any:
        nonlocal searches
        searches += 1
        return original(texts, threshold)

    original = near_duplicates.near_duplicates
    monkeypatch.setattr(near_duplicates, "near_duplicates", counting)
    prompts = config(tmp_path, owned(60, users=12), validation=["an owl"])
    read_splits(prompts)
    assert searches == 1
    splits = experiment_splits(prompts, 3)
    splits.check_leaks()
    splits.save(tmp_path / "splits.json")
    splits.final()
    assert searches == 2
    ExperimentSplits.load(tmp_path / "splits.json", prompts).fold(0)
    assert searches == 3


# -------------------------------------------------------------------------------------------- file


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, PromptsConfig]:
    """Return a splits.json of prompts by twelve users, and the configuration of these prompts."""
    prompts = config(tmp_path, [*owned(60, users=12), {"prompt": "é\u2028“quoted” \\ 猫"}])
    splits = experiment_splits(prompts, 3, seed=0)
    splits.save(tmp_path / "splits.json")
    assert ExperimentSplits.load(tmp_path / "splits.json", prompts) == splits
    return tmp_path / "splits.json", prompts


def test_saved_splits_have_one_prompt_a_line_and_load_unchanged(saved: tuple[Path, PromptsConfig]) -> None:
    """The file is readable, and loaded splits equal the saved ones."""
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


def copied_to_test(kept: dict[str, Any]) -> None:
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
        (copied_to_test, "in fold 2 and .* in test are the same prompt"),
        (moved, "user 'u.*' is on two sides: .* in fold 0 and .* in fold 1"),
    ],
)
def test_leak_in_the_file_raises_leak_error(
    saved: tuple[Path, PromptsConfig], change: Callable[[dict[str, Any]], object], complaint: str
) -> None:
    """The prompts are compared: group numbers in the file do not hide a leak."""
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
        (lambda kept: kept.update(test=[]), "test has no prompts"),
        (lambda kept: kept.update(folds=kept["folds"][:1]), "fewer than two folds"),
        (lambda kept: kept["folds"].append([]), "fold 3 has no prompts"),
        (lambda kept: kept["folds"].append("cat"), "fold 3 has no prompts"),
        (lambda kept: kept["folds"][1][0].pop("prompt"), "prompt 1 of fold 1 is not"),
        (lambda kept: kept["folds"][1][0].update(prompt=" "), "prompt 1 of fold 1 is empty"),
        (lambda kept: kept["folds"][1].append(kept["folds"][1][0]), "fold 1 is a repetition"),
        (lambda kept: kept["test"][0].update(user=3), "prompt 1 of test: user and cluster"),
    ],
)
def test_damaged_file_raises_config_error(
    saved: tuple[Path, PromptsConfig], change: Callable[[dict[str, Any]], object], complaint: str
) -> None:
    """The message is one line."""
    path, prompts = saved
    kept = json.loads(path.read_text())
    change(kept)
    path.write_text(json.dumps(kept))
    with pytest.raises(ConfigError, match=complaint) as caught:
        ExperimentSplits.load(path, prompts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000])
def test_file_of_another_kind_raises_config_error(tmp_path: Path, content: bytes) -> None:
    """The file may be truncated, not an object, or not text."""
    (tmp_path / "splits.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"splits\.json: "):
        ExperimentSplits.load(tmp_path / "splits.json", PromptsConfig(train=tmp_path))


def test_check_leaks_counts_leaks_and_names_the_closest() -> None:
    """An equal prompt is named before a near-duplicate."""
    sides = {"a": [Prompt(NEAR[0]), Prompt("an owl")], "b": [Prompt(NEAR[1]), Prompt("An owl.")]}
    with pytest.raises(LeakError, match=r"'an owl' in a and 'An owl.' in b are the same prompt \(and 1 more"):
        check_leaks(sides, NearDuplicates([prompt.text for side in sides.values() for prompt in side], 0.77))


# ------------------------------------------------------------------------------------ shipped files


@pytest.mark.parametrize("folder", ["miniature/prompts", "prompts/karlo"])
def test_shipped_prompt_files_have_no_leaks(folder: str) -> None:
    """The three files have no leaks, and held-out prompts have no near-duplicates."""
    files = {name: ROOT / folder / f"{name}.txt" for name in ("train", "validation", "test")}
    splits = experiment_splits(PromptsConfig(**files), 3)
    splits.check_leaks()
    train, validation, groups = read_splits(PromptsConfig(**files))
    assert len(set(groups)) == len(validation)
    assert len(set(splits.final().groups)) == len(splits.test)
    assert max(jaccard(one, other) for one in splits.final().validation for other in train) < 0.77
