"""Provenance of a run: configuration, prompts, evaluators, versions and time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from reward_service.settings import DEFAULT_CONFIG
from trainer.config import ConfigError, flatten, load_trainer_config
from trainer.report.run_data import RunData, counted, duration, items, mapping, shown, texts

# Paths and logging: differences in these do not change the run.
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
    """Setting whose value differs from the reference configuration's."""

    key: str
    value: str
    reference: str


class EvaluatorUsed(NamedTuple):
    """Identity of an evaluator and its weight in the composite."""

    name: str
    fingerprint: str
    calibration: str
    weight: str


@dataclass(frozen=True)
class Provenance:
    """Provenance as it is shown."""

    yaml: str
    reference: str  # configuration file of the differences
    differences: list[Difference]
    evaluators: list[EvaluatorUsed]
    versions: dict[str, str]
    prompts: list[str]
    facts: list[tuple[str, str]]


def provenance(run_data: RunData, final: RunData) -> Provenance:
    """Return the provenance of a run, or of an experiment with its final fit."""
    reference, differences = _differences(run_data)
    return Provenance(
        yaml=run_data.yaml if run_data.config else "",
        reference=reference,
        differences=differences,
        evaluators=_evaluators(run_data),
        versions=final.versions or next((it.versions for it in run_data.folds.values() if it.versions), {}),
        prompts=_prompts(run_data),
        facts=_facts(run_data, final),
    )


def _evaluators(run_data: RunData) -> list[EvaluatorUsed]:
    weights, guard = run_data.weights, mapping(run_data.config.get("guard")).get("evaluator")
    found = []
    for name, identity in sorted(run_data.identity.items()):
        fingerprint, _, calibration = identity.partition("/")
        weight = "guard" if name == guard else f"{weights[name]:g}" if weights.get(name) else "none"
        found.append(EvaluatorUsed(name, fingerprint, calibration, weight))
    return found


def _facts(run_data: RunData, final: RunData) -> list[tuple[str, str]]:
    parts = [final, *run_data.folds.values()] if run_data.is_experiment else [run_data]
    seconds = sum(part.seconds for part in parts)
    written = run_data.written
    evaluation = mapping(run_data.config.get("evaluation"))
    facts = [
        ("last written", f"{written:%Y-%m-%d %H:%M} UTC" if written else ""),
        ("training took", duration(seconds) if seconds else ""),
        ("seed", shown(run_data.config.get("seed")) if "seed" in run_data.config else ""),
        ("evaluation seed", shown(evaluation.get("seed")) if "seed" in evaluation else ""),
    ]
    return [(label, value) for label, value in facts if value]


def _prompts(run_data: RunData) -> list[str]:
    lines = []
    train, validation = (texts(run_data.prompts.get(key)) for key in ("train", "validation"))
    if train or validation:
        lines.append(
            f"{counted(len(train), 'prompt')} to train on, {counted(len(validation), 'prompt')} held out."
        )
        shared = len(set(map(str.casefold, train)) & set(map(str.casefold, validation)))
        lines.append(
            f"Warning: {counted(shared, 'prompt')} on both sides."
            if shared
            else "No prompt is on both sides."
        )
    groups = items(run_data.prompts.get("groups"))
    if groups:
        lines.append(f"The held-out prompts are in {counted(len(set(map(str, groups))), 'group')}.")
    splits = run_data.json("splits.json") if run_data.is_experiment else {}
    if folds := items(splits.get("folds")):
        sizes = ", ".join(str(len(items(fold))) for fold in folds)
        lines.append(
            f"{counted(len(folds), 'fold')} of {sizes} prompts; {len(items(splits.get('test')))} to test on."
        )
        lines.append("Near-duplicates and prompts of one user are on one side; checked at the start.")
    configured = mapping(run_data.config.get("prompts"))
    names = [
        Path(str(configured[key])).name for key in ("train", "validation", "test") if configured.get(key)
    ]
    return [*lines, f"Files: {', '.join(names)}."] if names else lines


# ----------------------------------------------------------------------------------- configuration


def _differences(run_data: RunData) -> tuple[str, list[Difference]]:
    """Return the shipped configuration with the fewest differences, and the differences."""
    if not run_data.config:
        return "", []
    found = []
    for path in sorted(DEFAULT_CONFIG.parent.glob("*.yaml")):
        try:
            shipped = flatten(load_trainer_config(path).model_dump(mode="json"))
        except ConfigError:
            continue
        found.append((path.name, differing(run_data.settings, shipped)))
    return min(found, key=lambda it: (len(it[1]), it[0] != DEFAULT_CONFIG.name), default=("", []))


def differing(settings: dict[str, object], reference: dict[str, object]) -> list[Difference]:
    """Return the settings whose values differ, apart from paths and logging."""
    keys = [key for key in {**reference, **settings} if not _is_place(key, PLACES)]
    pairs = ((key, _value(settings, key), _value(reference, key)) for key in keys)
    return [Difference(*it) for it in pairs if it[1] != it[2]]


def _value(settings: dict[str, object], key: str) -> str:
    return shown(settings[key]) if key in settings else "not set"


def _is_place(key: str, places: Sequence[str]) -> bool:
    return any(key == place or key.startswith(f"{place}.") for place in places)
