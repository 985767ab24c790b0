"""Train, validation and test splits without leakage.

A prompt, its near-duplicates, the other prompts of its user and those of its cluster are one group, and so
are prompts that are linked by any chain of these. A split never divides a group: held-out prompts are of
users, and of ideas, that the policy has not seen.
"""

import json
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from trainer.config import ConfigError, PromptsConfig
from trainer.data.near_duplicates import NearDuplicates, components
from trainer.data.prompts import Prompt, normalize_text, read_prompt_set
from trainer.runtime.errors import LeakError, reason
from trainer.runtime.files import write_atomically

REMEDY = "restore the file, or start a new experiment"
FORMAT = "reward-trainer splits 1"
LARGEST_SHARE = 2 / 3  # most prompts in one group: the other folds would be too small to train on

Prompts = tuple[Prompt, ...]


class Split(NamedTuple):
    """Training and validation prompts, and the group of each validation prompt.

    Prompts of one group are not independent: intervals are bootstrapped over groups.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    groups: tuple[int, ...]


@dataclass(frozen=True)
class ExperimentSplits:
    """The folds of cross-validation, and the test prompts, which are used once."""

    folds: tuple[Prompts, ...]
    test: Prompts
    near_duplicates: NearDuplicates = field(compare=False, repr=False)  # among all of these prompts

    @property
    def pool(self) -> Prompts:
        """The prompts of all folds."""
        return tuple(chain.from_iterable(self.folds))

    def fold(self, k: int) -> Split:
        """Return the split that trains on all folds but the k-th (from 0) and validates on that."""
        others = chain.from_iterable(fold for i, fold in enumerate(self.folds) if i != k)
        return self._split(others, self.folds[k])

    def final(self) -> Split:
        """Return the split that trains on all folds and measures on the test prompts."""
        return self._split(self.pool, self.test)

    def _split(self, train: Iterable[Prompt], validation: Prompts) -> Split:
        groups = tuple(self._groups[prompt.text] for prompt in validation)
        return Split(_texts(train), _texts(validation), groups)

    @cached_property
    def _groups(self) -> dict[str, int]:
        return _group_numbers((*self.pool, *self.test), self.near_duplicates)

    def check_leaks(self) -> None:
        """Check that no group is on two sides. The prompts count, not the group numbers in a file.

        Raises:
            LeakError: A prompt, a near-duplicate, a user or a cluster is on two sides.
        """
        sides = {f"fold {i}": fold for i, fold in enumerate(self.folds)}
        check_leaks({**sides, "test": self.test}, self.near_duplicates)

    def save(self, path: Path) -> None:
        """Write splits.json atomically, one prompt a line."""
        threshold = self.near_duplicates.threshold
        write_atomically(path, _to_json(self.folds, self.test, self._groups, threshold).encode())

    @classmethod
    def load(cls, path: Path, config: PromptsConfig) -> "ExperimentSplits":
        """Read and check splits.json.

        Raises:
            ConfigError: The file is missing or damaged.
            LeakError: A group is on two sides.
        """
        document = _read_json(path)
        folds = tuple(_read_side(path, f"fold {i}", fold) for i, fold in enumerate(document["folds"]))
        test = _read_side(path, "test", document["test"])
        splits = cls(folds, test, _find_near_duplicates(config, *folds, test))
        try:
            splits.check_leaks()
        except LeakError as error:
            raise LeakError(f"{path}: {error}") from error
        return splits


# ----------------------------------------------------------------------------------------- splitting


def read_splits(config: PromptsConfig, seed: int = 0) -> Split:
    """Read the training and validation prompts of a run.

    Without a validation file, a share of the training file's groups is held out.

    Raises:
        LeakError: The files overlap.
        ConfigError: There are too few groups to hold some out.
    """
    train = read_prompt_set(config.train, config.train_limit)
    if config.validation is None:
        near_duplicates = _find_near_duplicates(config, train)
        train, validation = _hold_out(train, near_duplicates, config, "validation", seed)
    else:
        validation = read_prompt_set(config.validation, config.validation_limit)
        near_duplicates = _find_near_duplicates(config, train, validation)
        check_leaks({str(config.train): train, str(config.validation): validation}, near_duplicates)
    groups = _group_numbers(validation, near_duplicates)
    return Split(_texts(train), _texts(validation), tuple(groups[prompt.text] for prompt in validation))


def experiment_splits(config: PromptsConfig, folds: int, seed: int = 0) -> ExperimentSplits:
    """Split into test prompts and folds of all other prompts (those of a validation file included).

    The same seed gives the same splits, whatever the order of the prompts in the files.

    Raises:
        LeakError: The test file overlaps with another file.
        ConfigError: There are too few groups.
    """
    train = read_prompt_set(config.train, config.train_limit)
    extra = read_prompt_set(config.validation, config.validation_limit) if config.validation else ()
    test = read_prompt_set(config.test, config.test_limit) if config.test else ()
    near_duplicates = _find_near_duplicates(config, train, extra, test)
    train_texts = set(_texts(train))
    pool = (*train, *(prompt for prompt in extra if prompt.text not in train_texts))
    if config.test is None:
        pool, test = _hold_out(pool, near_duplicates, config, "test", seed)
    else:
        for path, prompts in ((config.train, train), (config.validation, extra)):
            check_leaks({str(path): prompts, str(config.test): test}, near_duplicates)
    return ExperimentSplits(_make_folds(pool, near_duplicates, config, folds, seed), test, near_duplicates)


def _find_near_duplicates(config: PromptsConfig, *sides: Prompts) -> NearDuplicates:
    return NearDuplicates(_texts(chain.from_iterable(sides)), config.near_duplicate)


def _hold_out(
    prompts: Prompts,
    near_duplicates: NearDuplicates,
    config: PromptsConfig,
    side: Literal["validation", "test"],
    seed: int,
) -> tuple[Prompts, Prompts]:
    """Return the prompts without a share of the groups, and the prompts of that share."""
    from sklearn.model_selection import GroupShuffleSplit

    share = config.validation_share if side == "validation" else config.test_share
    purpose = f"to hold out trainer.prompts.{side}_share"
    ordered, groups = _sorted_groups(prompts, near_duplicates, config, 2, purpose)
    shuffle = GroupShuffleSplit(1, test_size=share, random_state=_random_state(seed, side))
    try:
        _, held_out = next(shuffle.split(ordered, groups=groups))
    except ValueError as error:
        raise ConfigError(
            f"trainer.prompts.{side}_share: {share} of {len(set(groups))} groups of prompts leaves none to "
            f"train on; lower it, or name a file as trainer.prompts.{side}"
        ) from error
    chosen = {ordered[i].text for i in held_out}
    return (
        tuple(prompt for prompt in prompts if prompt.text not in chosen),
        tuple(prompt for prompt in prompts if prompt.text in chosen),
    )


def _make_folds(
    prompts: Prompts, near_duplicates: NearDuplicates, config: PromptsConfig, folds: int, seed: int
) -> tuple[Prompts, ...]:
    """Return folds of whole groups, as equal in size as possible."""
    from sklearn.model_selection import GroupKFold

    ordered, groups = _sorted_groups(prompts, near_duplicates, config, folds, "for crossval.folds")
    # GroupKFold assigns the largest groups first and balances sizes; the seed decides among equal ones.
    renumbered = np.random.default_rng([seed, 2]).permutation(max(groups) + 1)[groups]
    fold_of: dict[str, int] = {}
    for k, (_, members) in enumerate(GroupKFold(folds).split(ordered, groups=renumbered)):
        fold_of |= {ordered[i].text: k for i in members}
    return tuple(tuple(prompt for prompt in prompts if fold_of[prompt.text] == k) for k in range(folds))


def _random_state(seed: int, side: str) -> np.random.RandomState:
    stream = {"validation": 0, "test": 1}[side]
    return np.random.RandomState(np.random.PCG64(np.random.SeedSequence([seed, stream])))


# ------------------------------------------------------------------------------------------- groups


class Link(NamedTuple):
    """Two prompts of one group, by their indices, and the reason that they are."""

    first: int
    second: int
    reason: str


def _sorted_groups(
    prompts: Prompts, near_duplicates: NearDuplicates, config: PromptsConfig, needed: int, purpose: str
) -> tuple[Prompts, list[int]]:
    """Return the prompts in alphabetical order, and the group of each.

    Raises:
        ConfigError: There are fewer groups than `needed`, or one of them is too large.
    """
    ordered = tuple(sorted(prompts, key=lambda prompt: prompt.text))
    links = _links(ordered, near_duplicates)
    groups: list[int] = components(len(ordered), ((link.first, link.second) for link in links)).tolist()
    sizes = np.bincount(groups)
    if len(sizes) < needed or sizes.max() > LARGEST_SHARE * len(ordered):
        largest = int(sizes.argmax())
        reasons = Counter(link.reason for link in links if groups[link.first] == largest).most_common(1)
        linked = f", linked most by {reasons[0][0]}" if reasons else ""
        raise ConfigError(
            f"{config.train}: {len(ordered)} prompts in {len(sizes)} groups are too few or too uneven "
            f"{purpose} ({needed} groups required): the largest group has {sizes.max()}{linked}; add prompts "
            "of other users and subjects, or use fewer folds"
        )
    return ordered, groups


def _group_numbers(prompts: Sequence[Prompt], near_duplicates: NearDuplicates) -> dict[str, int]:
    links = ((link.first, link.second) for link in _links(prompts, near_duplicates))
    return dict(zip(_texts(prompts), components(len(prompts), links).tolist(), strict=True))


def _links(prompts: Sequence[Prompt], near_duplicates: NearDuplicates) -> list[Link]:
    """Return enough links to connect every group."""
    links = [
        Link(pair.first, pair.second, "near-duplicates") for pair in near_duplicates.among(_texts(prompts))
    ]
    first: dict[str, int] = {}
    for i, prompt in enumerate(prompts):
        links += [Link(first.setdefault(owner, i), i, owner) for owner in _owners(prompt)]
    return [link for link in links if link.first != link.second]


def _owners(prompt: Prompt) -> list[str]:
    """Return the user and the cluster of a prompt, as messages name them."""
    named = (("user", prompt.user), ("cluster", prompt.cluster))
    return [f"{kind} {name!r}" for kind, name in named if name is not None]


def _texts(prompts: Iterable[Prompt]) -> tuple[str, ...]:
    return tuple(prompt.text for prompt in prompts)


# -------------------------------------------------------------------------------------------- leaks


def check_leaks(sides: Mapping[str, Sequence[Prompt]], near_duplicates: NearDuplicates) -> None:
    """Check that no group is on two sides.

    Args:
        sides: Prompts by the names of their sides.
        near_duplicates: Those among these prompts; may be of more prompts.

    Raises:
        LeakError: Near-duplicates, or prompts of one user or cluster, are on two sides.
    """
    prompts = [prompt for side in sides.values() for prompt in side]
    side_of = [name for name, side in sides.items() for _ in side]
    leaks = [
        (-pair.similarity, pair.first, pair.second)
        for pair in near_duplicates.among(_texts(prompts))
        if side_of[pair.first] != side_of[pair.second]
    ]
    if leaks:
        similarity, first, second = min(leaks)
        raise LeakError(
            f"{_quote(prompts, side_of, first)} and {_quote(prompts, side_of, second)} are "
            f"{_similarity_text(-similarity, near_duplicates.threshold)}{_more(leaks)}; "
            "remove one of them, or put both on one side"
        )
    divided = _divided_owners(prompts, side_of)
    if divided:
        owner, first, second = divided[0]
        raise LeakError(
            f"{owner} is on two sides: {_quote(prompts, side_of, first)} and "
            f"{_quote(prompts, side_of, second)}{_more(divided)}; put all of its prompts on one side"
        )


def _divided_owners(prompts: Sequence[Prompt], side_of: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return the owners with prompts on two sides, each with its first prompt on either."""
    first: dict[str, int] = {}
    divided: dict[str, tuple[str, int, int]] = {}
    for i, prompt in enumerate(prompts):
        for owner in _owners(prompt):
            if side_of[first.setdefault(owner, i)] != side_of[i]:
                divided.setdefault(owner, (owner, first[owner], i))
    return list(divided.values())


def _quote(prompts: Sequence[Prompt], side_of: Sequence[str], index: int) -> str:
    return f"{textwrap.shorten(prompts[index].text, 120, placeholder=' ...')!r} in {side_of[index]}"


def _similarity_text(similarity: float, threshold: float) -> str:
    if similarity == 1:
        return "the same prompt"
    return f"near-duplicates (similarity {similarity:.2f}, threshold prompts.near_duplicate = {threshold:g})"


def _more(leaks: Sequence[object]) -> str:
    return f" (and {len(leaks) - 1} more such)" if len(leaks) > 1 else ""


# ------------------------------------------------------------------------------------- splits.json


def _to_json(folds: Sequence[Prompts], test: Prompts, group: Mapping[str, int], threshold: float) -> str:
    """Return JSON with one line for each prompt."""

    def side(prompts: Prompts) -> str:
        lines = (json.dumps(_row(prompt, group[prompt.text]), ensure_ascii=False) for prompt in prompts)
        return "[\n      " + ",\n      ".join(lines) + "\n    ]"

    listed = ",\n    ".join(map(side, folds))
    return (
        f'{{\n  "format": {json.dumps(FORMAT)},\n  "near_duplicate": {threshold},\n'
        f'  "folds": [\n    {listed}\n  ],\n  "test":\n    {side(test)}\n}}\n'
    )


def _row(prompt: Prompt, group: int) -> dict[str, Any]:
    return {"prompt": prompt.text, "user": prompt.user, "cluster": prompt.cluster, "group": group}


def _read_json(path: Path) -> dict[str, Any]:
    """Read splits.json and check its structure down to the sides."""
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; {REMEDY}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({reason(error)}); {REMEDY}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ConfigError(f"{path}: its format is not {FORMAT!r}; {REMEDY}")
    missing = [key for key in ("folds", "test") if not isinstance(document.get(key), list)]
    if missing:
        raise ConfigError(f"{path}: {missing[0]} is missing or not a list; {REMEDY}")
    if len(document["folds"]) < 2:
        raise ConfigError(f"{path}: has fewer than two folds; {REMEDY}")
    return document


def _read_side(path: Path, name: str, rows: Any) -> Prompts:
    """Return the prompts of a fold or of the test; raise a ConfigError that names the first invalid one."""
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f"{path}: {name} has no prompts; {REMEDY}")
    prompts: dict[str, Prompt] = {}
    for number, row in enumerate(rows, 1):
        place = f"{path}: prompt {number} of {name}"
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ConfigError(f'{place} is not {{"prompt": "...", "user": ..., "cluster": ...}}; {REMEDY}')
        if not all(isinstance(row.get(key), str | None) for key in ("user", "cluster")):
            raise ConfigError(f"{place}: user and cluster must be a string or null; {REMEDY}")
        text = normalize_text(row["prompt"])
        if not text or text in prompts:
            raise ConfigError(f"{place} is {'a repetition' if text else 'empty'}; {REMEDY}")
        prompts[text] = Prompt(text, row.get("user"), row.get("cluster"))
    return tuple(prompts.values())
