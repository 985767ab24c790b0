"""Search space of a hyperparameter search: sampled values, trial configurations, pruners and checks.

The values of trial n depend only on the seed, n and the key of the space: after a kill, and with more trials
than before, the sequence is the same. Only the sampler `tpe` also depends on earlier trials' results.
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
from optuna.trial import FrozenTrial
from optuna.trial import Trial as OptunaTrial

from trainer.config import ConfigError, SearchConfig, SpaceConfig, TrainerConfig, with_values
from trainer.evaluation.guard import ROTATE, with_guard
from trainer.experiments.trial import TrialSettings
from trainer.rl.rewards import Scorer
from trainer.runs.setup import check_evaluators
from trainer.runtime.rng import stream_seed

# Sections that a search may vary. All others decide what is compared, and are the same in all trials.
SEARCHABLE = ("lora", "rollout", "objective", "update")
EVALUATIONS = 3  # least number in a trial that may be pruned: with fewer, pruning saves little

Space = Mapping[str, SpaceConfig]
Distribution = FloatDistribution | IntDistribution | CategoricalDistribution
Sampled = Mapping[str, Any]  # sampled values by key of the space


# ------------------------------------------------------------------------------------------ sampling


def sample_values(trial: OptunaTrial, space: Space) -> dict[str, Any]:
    """Return the values of a trial by key of the space; repeated calls return the same."""
    encoded = {key: _suggest(trial, key, _distribution(space[key])) for key in sorted(space)}
    return {key: _decode(space[key], encoded[key]) for key in space}


class PerTrialSampler(BaseSampler):
    """Optuna sampler that starts anew for each trial and key: a kill between two keys changes no value."""

    def __init__(self, kind: str, seed: int, space: Space) -> None:
        """Create the sampler.

        Args:
            kind: `SearchConfig.sampler`.
            seed: Seed of all trials.
            space: The search space.
        """
        self._kind = kind
        self._seed = seed
        self._space = space

    def infer_relative_search_space(self, *_: object) -> dict[str, BaseDistribution]:
        """Return an empty space: each key is sampled on its own."""
        return {}

    def sample_relative(self, *_: object) -> dict[str, Any]:
        """Return nothing; see `infer_relative_search_space`."""
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return this trial's value for the key `param_name`."""
        if self._kind == "qmc":
            return _sobol_point(trial.number, self._seed, self._space)[param_name]
        seed = stream_seed(self._seed, "search", trial.number, param_name) % 2**32
        sampler = RandomSampler(seed) if self._kind == "random" else TPESampler(seed=seed)
        return sampler.sample_independent(study, trial, param_name, param_distribution)


def _sobol_point(number: int, seed: int, space: Space) -> dict[str, Any]:
    """Return the n-th point of a scrambled Sobol sequence over the numeric keys; choices are random."""
    distributions: dict[str, BaseDistribution] = {key: _distribution(space[key]) for key in sorted(space)}
    with warnings.catch_warnings(action="ignore"):  # QMCSampler warns that it is experimental
        sampler = QMCSampler(
            scramble=True, seed=seed % 2**32, independent_sampler=RandomSampler(seed % 2**32)
        )
        study = optuna.create_study(sampler=sampler)
        trial = study.ask(distributions)
        for _ in range(number):
            study.tell(trial, 0.0)  # the sampler infers the space from the first complete trial
            trial = study.ask(distributions)
    return dict(trial.params)


def _distribution(spec: SpaceConfig) -> Distribution:
    if spec.choices is not None:
        return CategoricalDistribution([_encode(choice) for choice in spec.choices])
    assert spec.low is not None
    assert spec.high is not None
    if spec.integer:
        return IntDistribution(int(spec.low), int(spec.high), log=spec.log)
    return FloatDistribution(spec.low, spec.high, log=spec.log)


def _suggest(trial: OptunaTrial, key: str, distribution: Distribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(key, distribution.choices)
    suggest = trial.suggest_int if isinstance(distribution, IntDistribution) else trial.suggest_float
    return suggest(key, distribution.low, distribution.high, log=distribution.log)  # type: ignore[arg-type]


def _encode(choice: Any) -> Any:
    """Return a choice as databases store it: lists and mappings as JSON."""
    return json.dumps(choice, sort_keys=True) if isinstance(choice, (list, tuple, dict)) else choice


def _decode(spec: SpaceConfig, encoded: Any) -> Any:
    if spec.choices is None:
        return encoded
    return next(choice for choice in spec.choices if _encode(choice) == encoded)


# ------------------------------------------------------------------------------------- configuration


def resolve_settings(config: TrainerConfig, sampled: Sampled) -> TrialSettings:
    """Return a trial's settings: the sampled values, with `times` and `over` worked out."""
    absolute = {key: sampled[key] for key in sampled if _reference_key(config.search.space[key]) is None}
    relative = {key: _resolve(config, key, sampled[key], absolute) for key in sampled if key not in absolute}
    return {key: (absolute | relative)[key] for key in sampled}


def _resolve(config: TrainerConfig, key: str, value: Any, absolute: TrialSettings) -> Any:
    spec = config.search.space[key]
    other = str(_reference_key(spec))
    reference = absolute[other] if other in absolute else setting_value(config, other)
    result = value * reference if spec.times is not None else value / reference
    # Sizes are whole numbers: 64 over 8 is 8, not 8.0.
    whole = isinstance(value, int) and isinstance(reference, int) and result == int(result)
    return int(result) if whole else result


def _reference_key(spec: SpaceConfig) -> str | None:
    return spec.times if spec.times is not None else spec.over


def setting_value(config: TrainerConfig, dotted: str) -> Any:
    """Return the value of a setting by its dotted key.

    Raises:
        KeyError: There is no such setting.
    """
    value: Any = config.model_dump(mode="json")
    for key in dotted.split("."):
        if not isinstance(value, Mapping):
            raise KeyError(dotted)
        value = value[key]
    return value


def trial_config(config: TrainerConfig, changes: TrialSettings) -> TrainerConfig:
    """Return the configuration of a trial: the experiment's with the trial's settings.

    Trials are compared by the experiment's composite, whatever weights a trial trains with. The result does
    not depend on the number of trials, or on the location of the study.

    Raises:
        ConfigError: The settings do not fit together.
    """
    search, first_fold = config.search, with_guard(config, 0)
    iterations = search.iterations or config.iterations
    fixed: TrialSettings = {
        "iterations": iterations,
        "evaluation.every": _evaluation_interval(config, iterations),
        "evaluation.weights": dict(first_fold.composite_weights),
        "guard.evaluator": first_fold.guard.evaluator,
        "search": {},
        "crossval": {},
    }
    if config.guard.evaluator == ROTATE:
        fixed[f"objective.weights.{first_fold.guard.evaluator}"] = 0.0
    return with_values(config, {**changes, **fixed})


def _evaluation_interval(config: TrainerConfig, iterations: int) -> int:
    """Return the iterations between a trial's evaluations."""
    every, longest = config.evaluation.every, max(1, iterations // EVALUATIONS)
    if config.search.pruner == "none":
        return every
    return min(every, longest) if every else longest


# ------------------------------------------------------------------------------------------- pruners


def make_pruner(config: SearchConfig) -> BasePruner:
    """Return the configured pruner."""
    if config.pruner == "none":
        return NopPruner()
    if config.pruner == "halving":
        return SuccessiveHalving(config.reduction)
    # The null trial reports no values, but counts as complete.
    return MedianPruner(config.warmup_trials + config.null_trial)


class SuccessiveHalving(BasePruner):
    """Asynchronous successive halving (Li et al. 2020, arXiv:1810.05934) as a function of the reports.

    At evaluations 1, r, r², ... a trial continues if it is among the best 1/r of those that came as far; if
    they are fewer than r, if it is the best of them. Optuna's own pruner stores its decisions in the trial: a
    kill between a decision and a checkpoint would let a trial continue that was to end.
    """

    def __init__(self, reduction: int) -> None:
        """Create the pruner.

        Args:
            reduction: r, at least 2.
        """
        self._reduction = reduction

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Return whether to end the trial after its last report."""
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


# -------------------------------------------------------------------------------------------- checks


def check_space(config: TrainerConfig, scorer: Scorer) -> None:
    """Check that every value of the space makes a valid trial, before any is trained.

    Raises:
        ConfigError: There is no space, or a key of it cannot be searched; the message names the first.
    """
    space = config.search.space
    if not space:
        raise ConfigError(
            "trainer.search.space: nothing to search; name settings, such as "
            "--set 'search.space={update.learning_rate: {low: 1e-4, high: 1e-2, log: true}}'"
        )
    for key in space:
        try:
            _check_key(config, key)
            for changes in _extreme_settings(config, key):
                check_evaluators(trial_config(config, changes), scorer)
        except ConfigError as error:
            raise ConfigError(f"trainer.search.space.{key}: {error}{_hint(space[key], error)}") from None


def _check_key(config: TrainerConfig, key: str) -> None:
    space = config.search.space
    section, _, rest = key.partition(".")
    if section not in SEARCHABLE or not rest:
        raise ConfigError(f"a search varies settings below {', '.join(SEARCHABLE)}; remove this one")
    inner = next((other for other in space if other.startswith(f"{key}.")), None)
    if inner is not None:
        raise ConfigError(f"contains {inner}, which is searched too; remove one of them")
    other = _reference_key(space[key])
    if other is None:
        return
    if other in space and _reference_key(space[other]) is not None:
        raise ConfigError(f"{other} is itself relative to a setting; relate both to the same one")
    try:
        references = _end_values(space[other]) if other in space else [setting_value(config, other)]
    except KeyError:
        raise ConfigError(f"relative to {other}, which is not a setting; name an existing one") from None
    if not all(_is_number(value) for value in [*_end_values(space[key]), *references]):
        raise ConfigError(f"relative to {other}, but not all values are numbers; give numbers")
    if space[key].over is not None and not all(references):
        raise ConfigError(f"divided by {other}, which may be 0; exclude 0")


def _extreme_settings(config: TrainerConfig, key: str) -> Iterator[TrialSettings]:
    """Yield settings for the ends of a key's range, or for each choice, with those of its reference."""
    space = config.search.space
    other = _reference_key(space[key])
    references = [{other: value} for value in _end_values(space[other])] if other in space else [{}]
    for reference in references:
        for value in _end_values(space[key]):
            yield resolve_settings(config, {**reference, key: value})


def _end_values(spec: SpaceConfig) -> Sequence[Any]:
    if spec.choices is not None:
        return spec.choices
    assert spec.low is not None
    assert spec.high is not None
    if spec.integer:
        return [int(spec.low), int(spec.high)]
    # The third one is a fraction, which no setting of whole numbers accepts.
    return [spec.low, spec.high, spec.low + (spec.high - spec.low) / math.pi]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _hint(spec: SpaceConfig, error: ConfigError) -> str:
    fractional = "valid integer" in str(error) and spec.choices is None and not spec.integer
    return "; add integer: true" if fractional else ""
