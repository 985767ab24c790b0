"""What was run on what: configuration, prompts, judge, versions, time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from reward_service.settings import DEFAULT_CONFIG
from trainer.config import ConfigError, load_trainer_config
from trainer.report.run_data import Remains, counted, duration, flat, items, mapping, shown, texts

# Where a run is and how it is logged: a difference in these is no difference in what was run.
PLACES = (
    "name",
    "runs_dir",
    "logging",
    "service",
    "karlo.path",
    "prompts.train",
    "prompts.validation",
    "prompts.test",
)


class Difference(NamedTuple):
    """A setting with another value than in what it is compared with."""

    key: str
    value: str
    reference: str


class EvaluatorUsed(NamedTuple):
    """An evaluator's identity and its weight in the composite."""

    name: str
    fingerprint: str
    calibration: str
    weight: str


@dataclass(frozen=True)
class Provenance:
    """All of it, ready to be shown."""

    yaml: str
    reference: str  # what the differences are from
    differences: list[Difference]
    evaluators: list[EvaluatorUsed]
    versions: dict[str, str]
    prompts: list[str]
    facts: list[tuple[str, str]]


def provenance(remains: Remains, final: Remains) -> Provenance:
    """Of a run, or of an experiment with its final fit."""
    reference, differences = _differences(remains)
    return Provenance(
        yaml=remains.yaml if remains.config else "",
        reference=reference,
        differences=differences,
        evaluators=_evaluators(remains),
        versions=final.versions or next((it.versions for it in remains.folds.values() if it.versions), {}),
        prompts=_prompts(remains),
        facts=_facts(remains, final),
    )


def _evaluators(remains: Remains) -> list[EvaluatorUsed]:
    weights, guard = remains.weights, mapping(remains.config.get("guard")).get("evaluator")
    found = []
    for name, identity in sorted(remains.identity.items()):
        fingerprint, _, calibration = identity.partition("/")
        weight = "guard" if name == guard else f"{weights[name]:g}" if weights.get(name) else "none"
        found.append(EvaluatorUsed(name, fingerprint, calibration, weight))
    return found


def _facts(remains: Remains, final: Remains) -> list[tuple[str, str]]:
    parts = [final, *remains.folds.values()] if remains.is_experiment else [remains]
    seconds = sum(part.seconds for part in parts)
    written = remains.written
    evaluation = mapping(remains.config.get("evaluation"))
    facts = [
        ("last written", f"{written:%Y-%m-%d %H:%M} UTC" if written else ""),
        ("training took", duration(seconds) if seconds else ""),
        ("seed", shown(remains.config.get("seed")) if "seed" in remains.config else ""),
        ("evaluation seed", shown(evaluation.get("seed")) if "seed" in evaluation else ""),
    ]
    return [(label, value) for label, value in facts if value]


def _prompts(remains: Remains) -> list[str]:
    said = []
    train, validation = (texts(remains.prompts.get(key)) for key in ("train", "validation"))
    if train or validation:
        said.append(
            f"{counted(len(train), 'prompt')} to train on, {counted(len(validation), 'prompt')} held out."
        )
        shared = len(set(map(str.casefold, train)) & set(map(str.casefold, validation)))
        said.append(
            f"Warning: {counted(shared, 'prompt')} on both sides."
            if shared
            else "No prompt is on both sides."
        )
    groups = items(remains.prompts.get("groups"))
    if groups:
        said.append(f"The held-out prompts are of {counted(len(set(map(str, groups))), 'group')}.")
    splits = remains.json("splits.json") if remains.is_experiment else {}
    if folds := items(splits.get("folds")):
        sizes = ", ".join(str(len(items(fold))) for fold in folds)
        said.append(
            f"{counted(len(folds), 'fold')} of {sizes} prompts; {len(items(splits.get('test')))} to test on."
        )
        said.append(
            "Near-duplicates and prompts of one user lie on one side; this was checked when it began."
        )
    configured = mapping(remains.config.get("prompts"))
    names = [
        Path(str(configured[key])).name for key in ("train", "validation", "test") if configured.get(key)
    ]
    return [*said, f"Files: {', '.join(names)}."] if names else said


# ----------------------------------------------------------------------------------- configuration


def _differences(remains: Remains) -> tuple[str, list[Difference]]:
    """From that configuration of the shipped ones from which it differs least."""
    if not remains.config:
        return "", []
    found = []
    for path in sorted(DEFAULT_CONFIG.parent.glob("*.yaml")):
        try:
            shipped = flat(load_trainer_config(path).model_dump(mode="json"))
        except ConfigError:
            continue
        found.append((path.name, differing(remains.settings, shipped)))
    return min(found, key=lambda it: (len(it[1]), it[0] != DEFAULT_CONFIG.name), default=("", []))


def differing(settings: dict[str, object], reference: dict[str, object]) -> list[Difference]:
    """Settings whose values differ, by their keys; where a run is counts for nothing."""
    keys = [key for key in {**reference, **settings} if not _is_place(key, PLACES)]
    pairs = ((key, _value(settings, key), _value(reference, key)) for key in keys)
    return [Difference(*it) for it in pairs if it[1] != it[2]]


def _value(settings: dict[str, object], key: str) -> str:
    return shown(settings[key]) if key in settings else "not set"


def _is_place(key: str, places: Sequence[str]) -> bool:
    return any(key == place or key.startswith(f"{place}.") for place in places)
