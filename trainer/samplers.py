"""What a trial tries: drawn by one of Optuna's samplers from (seed, number of the trial, key of the space).

Whatever was killed, and whoever is at it, trial n tries the same settings; more trials than before continue
the same sequence. Only `tpe` looks at earlier trials as well.
"""

import json
import warnings
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, QMCSampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial

from trainer.sections import SpaceConfig
from trainer.streams import stream_seed

Space = Mapping[str, SpaceConfig]
Distribution = FloatDistribution | IntDistribution | CategoricalDistribution


def draw(trial: Trial, space: Space) -> dict[str, Any]:
    """What a trial tries, by key of the space; the same whenever it is asked."""
    drawn = {key: _suggest(trial, key, _distribution(space[key])) for key in sorted(space)}
    return {key: _decoded(space[key], drawn[key]) for key in space}


class Numbered(BaseSampler):
    """One of Optuna's samplers, begun anew for each trial and key: what is drawn depends on no history of
    draws, which a kill would cut."""

    def __init__(self, kind: str, seed: int, space: Space) -> None:
        self._kind = kind
        self._seed = seed
        self._space = space

    def infer_relative_search_space(self, *_: object) -> dict[str, BaseDistribution]:
        """None: each key is drawn for itself."""
        return {}

    def sample_relative(self, *_: object) -> dict[str, Any]:
        """See `infer_relative_search_space`."""
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """What this trial tries for the key `param_name`."""
        if self._kind == "qmc":
            return _evenly(trial.number, self._seed, self._space)[param_name]
        seed = stream_seed(self._seed, "search", trial.number, param_name) % 2**32
        sampler = RandomSampler(seed) if self._kind == "random" else TPESampler(seed=seed)
        return sampler.sample_independent(study, trial, param_name, param_distribution)


def _evenly(number: int, seed: int, space: Space) -> dict[str, Any]:
    """The n-th point of a scrambled Sobol sequence over the numbers of the space; choices at random."""
    spread: dict[str, BaseDistribution] = {key: _distribution(space[key]) for key in sorted(space)}
    with warnings.catch_warnings(action="ignore"):  # that it is experimental
        sampler = QMCSampler(
            scramble=True, seed=seed % 2**32, independent_sampler=RandomSampler(seed % 2**32)
        )
        study = optuna.create_study(sampler=sampler)
        trial = study.ask(spread)
        for _ in range(number):
            study.tell(trial, 0.0)  # it learns the space from the first complete trial
            trial = study.ask(spread)
    return dict(trial.params)


def _distribution(spread: SpaceConfig) -> Distribution:
    if spread.choices is not None:
        return CategoricalDistribution([_encoded(choice) for choice in spread.choices])
    assert spread.low is not None
    assert spread.high is not None
    if spread.integer:
        return IntDistribution(int(spread.low), int(spread.high), log=spread.log)
    return FloatDistribution(spread.low, spread.high, log=spread.log)


def _suggest(trial: Trial, key: str, spread: Distribution) -> Any:
    if isinstance(spread, CategoricalDistribution):
        return trial.suggest_categorical(key, spread.choices)
    suggest = trial.suggest_int if isinstance(spread, IntDistribution) else trial.suggest_float
    return suggest(key, spread.low, spread.high, log=spread.log)  # type: ignore[arg-type]


def _encoded(choice: Any) -> Any:
    """A choice as databases keep it: lists and mappings as JSON."""
    return json.dumps(choice, sort_keys=True) if isinstance(choice, (list, tuple, dict)) else choice


def _decoded(spread: SpaceConfig, drawn: Any) -> Any:
    if spread.choices is None:
        return drawn
    return next(choice for choice in spread.choices if _encoded(choice) == drawn)
