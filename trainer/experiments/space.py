"""What a search draws from, and how what is drawn becomes a trial's configuration.

Which trials are not worth finishing, by what they and the others have reported.

What a trial tries: drawn by one of Optuna's samplers from (seed, number of the trial, key of the space).

Whatever was killed, and whoever is at it, trial n tries the same settings; more trials than before continue
the same sequence. Only `tpe` looks at earlier trials as well.
"""

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, QMCSampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial

from trainer.config import ConfigError, SearchConfig, SpaceConfig, TrainerConfig, with_values
from trainer.evaluation.guard import ROTATE, with_guard
from trainer.rl.rewards import Scorer
from trainer.runs.setup import check_evaluators
from trainer.runtime.rng import stream_seed


def make_pruner(config: SearchConfig) -> BasePruner:
    """The configured one. The null trial reports nothing, and is one more complete trial to wait for."""
    if config.pruner == "none":
        return NopPruner()
    if config.pruner == "halving":
        return Halving(config.reduction)
    return MedianPruner(config.warmup_trials + config.null_trial)


class Halving(BasePruner):
    """Asynchronous successive halving (Li et al. 2020, arXiv:1810.05934) as a function of the reports.

    At evaluations 1, r, r², ... a trial goes on if it is among the best r-th of those that came as far;
    while they are fewer than r, if it is the best of them. Optuna's own keeps marks in the trial: a kill
    between a mark and a checkpoint would let a trial go on that was to end.
    """

    def __init__(self, reduction: int) -> None:
        self._reduction = reduction

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether the trial is to end after its last report."""
        step = trial.last_step
        if step is None or not _is_power(len(trial.intermediate_values), self._reduction):
            return False
        others = study.get_trials(deepcopy=False)
        values = [it.intermediate_values[step] for it in others if step in it.intermediate_values]
        promoted = max(1, len(values) // self._reduction)
        return trial.intermediate_values[step] < sorted(values)[-promoted]


def _is_power(number: int, base: int) -> bool:
    while number % base == 0:
        number //= base
    return number == 1


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


# What decides how it is learned. The rest decides what is compared, and must be the same in all trials.
SEARCHABLE = ("lora", "rollout", "objective", "update")
EVALUATIONS = 3  # of a trial that may be pruned, at least: with few, little can be saved

Drawn = Mapping[str, Any]  # what the sampler drew, by key of the space
Settings = dict[str, Any]  # dotted keys of the configuration to values


def settings(config: TrainerConfig, drawn: Drawn) -> Settings:
    """The settings that follow from what was drawn: multiples and shares of other settings worked out."""
    own = {key: drawn[key] for key in drawn if _other(config.search.space[key]) is None}
    related = {key: _related(config, key, drawn[key], own) for key in drawn if key not in own}
    return {key: (own | related)[key] for key in drawn}


def _related(config: TrainerConfig, key: str, value: Any, own: Settings) -> Any:
    spread = config.search.space[key]
    other = str(_other(spread))
    reference = own[other] if other in own else setting(config, other)
    result = value * reference if spread.times is not None else value / reference
    # The sizes of things are whole: 64 over 8 is 8, not 8.0.
    whole = isinstance(value, int) and isinstance(reference, int) and result == int(result)
    return int(result) if whole else result


def _other(spread: SpaceConfig) -> str | None:
    return spread.times if spread.times is not None else spread.over


def setting(config: TrainerConfig, dotted: str) -> Any:
    """The configuration's value of a dotted key. Raises KeyError."""
    found: Any = config.model_dump(mode="json")
    for key in dotted.split("."):
        if not isinstance(found, Mapping):
            raise KeyError(dotted)
        found = found[key]
    return found


def trial_config(config: TrainerConfig, changes: Settings) -> TrainerConfig:
    """A trial's configuration: the experiment's, with the trial's settings. Raises ConfigError.

    Trials are compared by the experiment's composite, whatever weights a trial learns with. What a trial is
    does not depend on how many others there are, or where the study is kept.
    """
    search, first_fold = config.search, with_guard(config, 0)
    iterations = search.iterations or config.iterations
    fixed: Settings = {
        "iterations": iterations,
        "evaluation.every": _every(config, iterations),
        "evaluation.weights": dict(first_fold.reward_evaluators),
        "guard.evaluator": first_fold.guard.evaluator,
        "search": {},
        "crossval": {},
    }
    if config.guard.evaluator == ROTATE:
        fixed[f"objective.weights.{first_fold.guard.evaluator}"] = 0.0
    return with_values(config, {**changes, **fixed})


def _every(config: TrainerConfig, iterations: int) -> int:
    """Iterations between a trial's evaluations."""
    every, most = config.evaluation.every, max(1, iterations // EVALUATIONS)
    if config.search.pruner == "none":
        return every
    return min(every, most) if every else most


# -------------------------------------------------------------------------------------------- checks


def check_space(config: TrainerConfig, scorer: Scorer) -> None:
    """Raises ConfigError naming the first key of the space that cannot be tried, before anything is."""
    space = config.search.space
    if not space:
        raise ConfigError(
            "trainer.search.space: nothing to search; name settings, such as "
            "--set search.space.update.learning_rate='{low: 1e-4, high: 1e-2, log: true}'"
        )
    for key in space:
        try:
            _check_key(config, key)
            for changes in _extremes(config, key):
                check_evaluators(trial_config(config, changes), scorer)
        except ConfigError as error:
            raise ConfigError(f"trainer.search.space.{key}: {error}{_hint(space[key], error)}") from None


def _check_key(config: TrainerConfig, key: str) -> None:
    space = config.search.space
    section, _, rest = key.partition(".")
    if section not in SEARCHABLE or not rest:
        raise ConfigError(f"a search varies settings below {', '.join(SEARCHABLE)}; take it out")
    inner = next((other for other in space if other.startswith(f"{key}.")), None)
    if inner is not None:
        raise ConfigError(f"{inner} is a part of it; take one of them out")
    other = _other(space[key])
    if other is None:
        return
    if other in space and _other(space[other]) is not None:
        raise ConfigError(f"{other} is itself relative to a setting; relate both to the same one")
    try:
        references = _ends(space[other]) if other in space else [setting(config, other)]
    except KeyError:
        raise ConfigError(f"relative to {other}, which is no setting; name one that is") from None
    if not all(_is_number(value) for value in [*_ends(space[key]), *references]):
        raise ConfigError(f"relative to {other}, but not all of these are numbers; give numbers")
    if space[key].over is not None and not all(references):
        raise ConfigError(f"divided by {other}, which may be 0; leave 0 out")


def _extremes(config: TrainerConfig, key: str) -> Iterator[Settings]:
    """The settings at the ends of a range and inside it, or of all choices; with those it is relative to."""
    space = config.search.space
    other = _other(space[key])
    references = [{other: value} for value in _ends(space[other])] if other in space else [{}]
    for reference in references:
        for value in _ends(space[key]):
            yield settings(config, {**reference, key: value})


def _ends(spread: SpaceConfig) -> Sequence[Any]:
    if spread.choices is not None:
        return spread.choices
    assert spread.low is not None
    assert spread.high is not None
    if spread.integer:
        return [int(spread.low), int(spread.high)]
    # A number between that no setting of whole numbers takes.
    return [spread.low, spread.high, spread.low + (spread.high - spread.low) / math.pi]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _hint(spread: SpaceConfig, error: ConfigError) -> str:
    fractional = "valid integer" in str(error) and spread.choices is None and not spread.integer
    return "; add integer: true" if fractional else ""
