"""Who is trained on, who is validated on and who is only tested on; and that nobody is on two sides.

A prompt, its near-duplicates, the other prompts of its user and those of its cluster are one group, and so is
whatever hangs together by any of these. Groups are never parted: a fold that is left out holds prompts of
people, and of ideas, that the policy has not seen.
"""

import json
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from trainer.config import ConfigError, PromptsConfig
from trainer.data.near_duplicates import components, near_duplicates
from trainer.data.prompts import Prompt, cleaned, read_prompt_set
from trainer.runtime.errors import LeakError, reason
from trainer.runtime.files import write_atomically

REMEDY = "restore the file, or begin a new experiment"
FORMAT = "reward-trainer splits 1"
LARGEST_SHARE = 2 / 3  # of the prompts in one group: the other folds would be too small to learn from

Prompts = tuple[Prompt, ...]


class Split(NamedTuple):
    """What is trained on and what it is evaluated on, with the group of each of the latter's prompts.

    Prompts of one group are not independent: intervals are bootstrapped over groups.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    groups: tuple[int, ...]


@dataclass(frozen=True)
class ExperimentSplits:
    """The folds of cross-validation, and the test prompts that are looked at once."""

    folds: tuple[Prompts, ...]
    test: Prompts
    near_duplicate: float  # prompts are from this similarity on

    @property
    def pool(self) -> Prompts:
        """The prompts of all folds."""
        return tuple(chain.from_iterable(self.folds))

    def fold(self, k: int) -> Split:
        """Train on all folds but the k-th (from 0), validate on it."""
        others = chain.from_iterable(fold for i, fold in enumerate(self.folds) if i != k)
        return self._split(others, self.folds[k])

    def final(self) -> Split:
        """Train on all folds, measure on the test prompts."""
        return self._split(self.pool, self.test)

    def _split(self, train: Iterable[Prompt], validation: Prompts) -> Split:
        groups = tuple(self._groups[prompt.text] for prompt in validation)
        return Split(_texts(train), _texts(validation), groups)

    @cached_property
    def _groups(self) -> dict[str, int]:
        return _group_of((*self.pool, *self.test), self.near_duplicate)

    def check_leaks(self) -> None:
        """Raises LeakError where a prompt, a near-duplicate, a user or a cluster is on two sides.

        What counts is what the prompts say, not which groups they were once given.
        """
        sides = {f"fold {i}": fold for i, fold in enumerate(self.folds)}
        check_leaks({**sides, "test": self.test}, self.near_duplicate)

    def save(self, path: Path) -> None:
        """Write splits.json, a prompt a line, atomically."""
        text = _shown(self.folds, self.test, self._groups, self.near_duplicate)
        write_atomically(path, text.encode())

    @classmethod
    def load(cls, path: Path, config: PromptsConfig) -> "ExperimentSplits":
        """Read and check splits.json. Raises ConfigError where it is none, LeakError where sides overlap."""
        kept = _read_json(path)
        folds = tuple(_side(path, f"fold {i}", fold) for i, fold in enumerate(kept["folds"]))
        splits = cls(folds, _side(path, "test", kept["test"]), config.near_duplicate)
        try:
            splits.check_leaks()
        except LeakError as error:
            raise LeakError(f"{path}: {error}") from error
        return splits


# -------------------------------------------------------------------------------------------- making


def read_splits(config: PromptsConfig, seed: int = 0) -> Split:
    """Train and validation prompts of a run: two files, or one of whose groups a share is held out.

    Raises LeakError where the files overlap, ConfigError where there is nothing to divide.
    """
    train = read_prompt_set(config.train, config.train_limit)
    if config.validation is None:
        train, validation = _held_out(train, config, "validation", seed)
    else:
        validation = read_prompt_set(config.validation, config.validation_limit)
        check_leaks({str(config.train): train, str(config.validation): validation}, config.near_duplicate)
    groups = _group_of(validation, config.near_duplicate)
    return Split(_texts(train), _texts(validation), tuple(groups[prompt.text] for prompt in validation))


def experiment_splits(config: PromptsConfig, folds: int, seed: int = 0) -> ExperimentSplits:
    """Test prompts, and so many folds of all others (of the validation file too, if there is one).

    The same seed makes the same splits, in whatever order the files list the prompts. Raises LeakError where
    the test file overlaps with another, ConfigError where there are too few groups.
    """
    train = read_prompt_set(config.train, config.train_limit)
    extra = read_prompt_set(config.validation, config.validation_limit) if config.validation else ()
    known = set(_texts(train))
    pool = (*train, *(prompt for prompt in extra if prompt.text not in known))
    if config.test is None:
        pool, test = _held_out(pool, config, "test", seed)
    else:
        test = read_prompt_set(config.test, config.test_limit)
        for path, prompts in ((config.train, train), (config.validation, extra)):
            check_leaks({str(path): prompts, str(config.test): test}, config.near_duplicate)
    return ExperimentSplits(_folds(pool, config, folds, seed), test, config.near_duplicate)


def _held_out(
    prompts: Prompts, config: PromptsConfig, side: Literal["validation", "test"], seed: int
) -> tuple[Prompts, Prompts]:
    """The prompts without, and those of, a share of the groups."""
    from sklearn.model_selection import GroupShuffleSplit

    share = config.validation_share if side == "validation" else config.test_share
    ordered, groups = _ordered(prompts, config, 2, f"to hold out trainer.prompts.{side}_share")
    shuffle = GroupShuffleSplit(1, test_size=share, random_state=_random_state(seed, side))
    try:
        _, held = next(shuffle.split(ordered, groups=groups))
    except ValueError as error:
        raise ConfigError(
            f"trainer.prompts.{side}_share: {share} of {len(set(groups))} groups of prompts leaves none to "
            f"train on; lower it, or name a file as trainer.prompts.{side}"
        ) from error
    chosen = {ordered[i].text for i in held}
    return (
        tuple(prompt for prompt in prompts if prompt.text not in chosen),
        tuple(prompt for prompt in prompts if prompt.text in chosen),
    )


def _folds(prompts: Prompts, config: PromptsConfig, folds: int, seed: int) -> tuple[Prompts, ...]:
    """So many parts, as equal in size as whole groups can be."""
    from sklearn.model_selection import GroupKFold

    ordered, groups = _ordered(prompts, config, folds, "of crossval.folds")
    # GroupKFold deals the largest groups first and balances sizes; the seed decides among equals.
    renamed = np.random.default_rng([seed, 2]).permutation(max(groups) + 1)[groups]
    fold_of: dict[str, int] = {}
    for k, (_, held) in enumerate(GroupKFold(folds).split(ordered, groups=renamed)):
        fold_of |= {ordered[i].text: k for i in held}
    return tuple(tuple(prompt for prompt in prompts if fold_of[prompt.text] == k) for k in range(folds))


def _ordered(prompts: Prompts, config: PromptsConfig, least: int, what: str) -> tuple[Prompts, list[int]]:
    """The prompts in alphabetical order, and their groups. Raises ConfigError where none can be left out."""
    ordered = tuple(sorted(prompts, key=lambda prompt: prompt.text))
    links = _links(ordered, config.near_duplicate)
    groups: list[int] = components(len(ordered), ((link.first, link.second) for link in links)).tolist()
    sizes = np.bincount(groups)
    if len(sizes) < least or sizes.max() > LARGEST_SHARE * len(ordered):
        largest = int(sizes.argmax())
        tie = Counter(link.tie for link in links if groups[link.first] == largest).most_common(1)
        ties = f", tied most by {tie[0][0]}" if tie else ""
        raise ConfigError(
            f"{config.train}: {len(ordered)} prompts in {len(sizes)} groups are too few or too uneven {what} "
            f"({least} needed): the largest group holds {sizes.max()}{ties}; add prompts of other users and "
            "subjects, or ask for fewer folds"
        )
    return ordered, groups


class Link(NamedTuple):
    """Two prompts of one group, by their places, and what ties them."""

    first: int
    second: int
    tie: str


def _links(prompts: Sequence[Prompt], threshold: float) -> list[Link]:
    """Enough of them to tie every group together."""
    links = [
        Link(pair.first, pair.second, "near-duplicates")
        for pair in near_duplicates(_texts(prompts), threshold)
    ]
    first: dict[str, int] = {}
    for i, prompt in enumerate(prompts):
        links += [Link(first.setdefault(owner, i), i, owner) for owner in _owners(prompt)]
    return [link for link in links if link.first != link.second]


def _owners(prompt: Prompt) -> list[str]:
    """The user and the cluster of a prompt, as messages call them."""
    named = (("user", prompt.user), ("cluster", prompt.cluster))
    return [f"{kind} {name!r}" for kind, name in named if name is not None]


def _group_of(prompts: Sequence[Prompt], threshold: float) -> dict[str, int]:
    links = ((link.first, link.second) for link in _links(prompts, threshold))
    return dict(zip(_texts(prompts), components(len(prompts), links).tolist(), strict=True))


def _random_state(seed: int, side: str) -> np.random.RandomState:
    stream = {"validation": 0, "test": 1}[side]
    return np.random.RandomState(np.random.PCG64(np.random.SeedSequence([seed, stream])))


def _texts(prompts: Iterable[Prompt]) -> tuple[str, ...]:
    return tuple(prompt.text for prompt in prompts)


# ------------------------------------------------------------------------------------------- leaks


def check_leaks(sides: Mapping[str, Sequence[Prompt]], threshold: float) -> None:
    """Raises LeakError where near-duplicates, prompts of one user or of one cluster are on two sides."""
    prompts = [prompt for side in sides.values() for prompt in side]
    side_of = [name for name, side in sides.items() for _ in side]
    leaks = [
        (-pair.similarity, pair.first, pair.second)
        for pair in near_duplicates(_texts(prompts), threshold)
        if side_of[pair.first] != side_of[pair.second]
    ]
    if leaks:
        similarity, first, second = min(leaks)
        raise LeakError(
            f"{_placed(prompts, side_of, first)} and {_placed(prompts, side_of, second)} are "
            f"{_likeness(-similarity, threshold)}{_more(leaks)}; remove one of them, or put both on one side"
        )
    strays = _strays(prompts, side_of)
    if strays:
        owner, first, second = strays[0]
        raise LeakError(
            f"{owner} is on two sides: {_placed(prompts, side_of, first)} and "
            f"{_placed(prompts, side_of, second)}{_more(strays)}; put all of its prompts on one side"
        )


def _strays(prompts: Sequence[Prompt], side_of: Sequence[str]) -> list[tuple[str, int, int]]:
    """Owners with prompts on two sides, and the first prompt of each on either."""
    first: dict[str, int] = {}
    found: dict[str, tuple[str, int, int]] = {}
    for i, prompt in enumerate(prompts):
        for owner in _owners(prompt):
            if side_of[first.setdefault(owner, i)] != side_of[i]:
                found.setdefault(owner, (owner, first[owner], i))
    return list(found.values())


def _placed(prompts: Sequence[Prompt], side_of: Sequence[str], place: int) -> str:
    return f"{textwrap.shorten(prompts[place].text, 120, placeholder=' ...')!r} in {side_of[place]}"


def _likeness(similarity: float, threshold: float) -> str:
    if similarity == 1:
        return "the same prompt"
    return f"near-duplicates (similarity {similarity:.2f}; from prompts.near_duplicate = {threshold:g} on)"


def _more(leaks: Sequence[object]) -> str:
    return f" (and {len(leaks) - 1} more such)" if len(leaks) > 1 else ""


# ---------------------------------------------------------------------------------------------- file


def _shown(folds: Sequence[Prompts], test: Prompts, group: Mapping[str, int], threshold: float) -> str:
    """JSON with a line for each prompt."""

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
    """What splits.json says, its outer parts checked."""
    try:
        kept = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; {REMEDY}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({reason(error)}); {REMEDY}") from error
    if not isinstance(kept, dict) or kept.get("format") != FORMAT:
        raise ConfigError(f"{path}: its format is not {FORMAT!r}; {REMEDY}")
    missing = [key for key in ("folds", "test") if not isinstance(kept.get(key), list)]
    if missing:
        raise ConfigError(f"{path}: {missing[0]} is missing or no list; {REMEDY}")
    if len(kept["folds"]) < 2:
        raise ConfigError(f"{path}: has fewer than two folds; {REMEDY}")
    return kept


def _side(path: Path, name: str, rows: Any) -> Prompts:
    """The prompts of a fold or of the test. Raises ConfigError naming the one that is none."""
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f"{path}: {name} holds no prompts; {REMEDY}")
    prompts: dict[str, Prompt] = {}
    for number, row in enumerate(rows, 1):
        place = f"{path}: prompt {number} of {name}"
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ConfigError(f'{place} is no {{"prompt": "...", "user": ..., "cluster": ...}}; {REMEDY}')
        if not all(isinstance(row.get(key), str | None) for key in ("user", "cluster")):
            raise ConfigError(f"{place}: user and cluster are a string or null; {REMEDY}")
        text = cleaned(row["prompt"])
        if not text or text in prompts:
            raise ConfigError(f"{place} is {'there twice' if text else 'empty'}; {REMEDY}")
        prompts[text] = Prompt(text, row.get("user"), row.get("cluster"))
    return tuple(prompts.values())
