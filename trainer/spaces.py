"""What a search draws from, and how what is drawn becomes a trial's configuration."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainer.config import ConfigError, TrainerConfig, with_values
from trainer.guards import ROTATE, with_guard
from trainer.runs import check_evaluators
from trainer.scoring import Scorer
from trainer.sections import SpaceConfig

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
        "evaluation.weights": dict(first_fold.judged_by),
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
