"""Model commands of `reward-service`: list evaluators, download their files, check the canary's scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reward_service.config import EvaluatorConfig, ServiceConfig
from reward_service.engine.evaluators import FORMULAS
from reward_service.engine.files import LocalFile, ModelFiles, ProgressCallback
from reward_service.engine.loading import EvaluatorPlan, build_engine, check_models, plan_evaluators
from reward_service.engine.types import ModelError
from reward_service.files import write_atomically
from reward_service.scoring.breaker import EvaluatorBreakers
from reward_service.scoring.calibration import Calibration, load_calibration
from reward_service.scoring.canary import (
    GoldenScore,
    GoldenScores,
    canary_pair,
    load_golden,
    merge_golden,
    serialize_golden,
)
from reward_service.settings import ConfigError

_SHORT_HASH = 12
_SCALE_STATE = {True: ", provisional", False: ", measured", None: ""}


@dataclass(frozen=True)
class PreprocessingEntry:
    """Preprocessing of images, as listed in JSON."""

    method: str
    size_px: int
    antialias: bool


@dataclass(frozen=True)
class EvaluatorEntry:
    """One configured evaluator, as listed in JSON.

    What depends on its files is None if they are not available, which is an error only if it is enabled;
    `problem` then says what is missing. `provisional` is None without a scale.
    """

    name: str
    kind: str
    formula: str
    enabled: bool
    weight: float
    tower: str
    weights: str
    weights_sha256: str | None
    head: str | None
    head_sha256: str | None
    preprocessing: PreprocessingEntry | None
    tokenizer: str | None
    dtype: str | None
    fingerprint: str | None
    calibration: str | None
    provisional: bool | None
    problem: str | None


def list_evaluators(config: ServiceConfig, progress: ProgressCallback) -> list[EvaluatorEntry]:
    """Return all configured evaluators, without reading weights or downloading files.

    Raises:
        ConfigError: files of an enabled evaluator or the calibration table are missing or not usable
    """
    table = load_calibration(config.calibration, tuple(config.enabled))
    files = ModelFiles(progress, download=False)
    plans = plan_evaluators(config, files, config.enabled)
    check_models(plans)
    problems: dict[str, str] = {}
    for name in config.evaluators.keys() - plans.keys():
        try:
            plans |= plan_evaluators(config, files, (name,))
        except ModelError as error:
            problems[name] = str(error)
    return [_entry(name, config, plans.get(name), table, problems.get(name)) for name in config.evaluators]


def print_evaluators(entries: Sequence[EvaluatorEntry], *, as_json: bool) -> None:
    """Print one paragraph per evaluator, or JSON on one line."""
    if as_json:
        print(json.dumps({"evaluators": [asdict(entry) for entry in entries]}, ensure_ascii=False))
        return
    for entry in entries:
        print(entry.name if entry.enabled else f"{entry.name} (off)")
        for label, value in _lines(entry):
            print(f"  {label:<14} {value}")


def download_models(
    config: ServiceConfig, names: Sequence[str], progress: ProgressCallback, output: Callable[[str], None]
) -> None:
    """Download and verify all files of the named evaluators, and output each with its hash and size.

    Raises:
        ConfigError: a file is not available, or is not what the configuration expects
    """
    plans = plan_evaluators(config, ModelFiles(progress), names)
    check_models(plans)
    files = {file.path: file for plan in plans.values() for file in plan.files}
    for file in files.values():
        output(f"{file.sha256}  {file.size_bytes:>13,}  {file.source}")
    total = sum(file.size_bytes for file in files.values())
    output(f"{len(files)} files, {total:,} bytes in all; ready to serve {', '.join(names)}")


def compare_canary(
    config: ServiceConfig, progress: ProgressCallback, output: Callable[[str], None]
) -> str | None:
    """Score the canary pair and output each score, its golden score's presence and its fingerprint.

    Returns:
        one line if a score differs from its golden score, else None

    Raises:
        ConfigError: the models or the file of golden scores are not usable
    """
    golden = load_golden(config.canary) if config.canary else None
    engine = build_engine(config, progress)
    breakers = EvaluatorBreakers(engine, golden)
    mismatches = breakers.self_test()
    for name, score in engine.score([breakers.canary], deterministic=True)[0].raw.items():
        status = "no golden score" if name in breakers.without_golden_score() else "golden"
        output(f"{name:<10} {score:.7g}  {status}  {engine.evaluators[name].fingerprint}")
    return "; ".join(mismatches) or None


def write_golden_scores(config: ServiceConfig, path: Path, progress: ProgressCallback) -> None:
    """Write the canary's scores as golden scores; those of other devices and fingerprints are kept.

    Raises:
        ConfigError: the models are not usable, or the file cannot be written
    """
    old: GoldenScores | None = load_golden(path) if path.exists() else None
    engine = build_engine(config, progress)
    raw = engine.score([canary_pair()], deterministic=True)[0].raw
    new = [(engine.evaluators[name].fingerprint, GoldenScore(evaluator=name, raw=raw[name])) for name in raw]
    try:
        write_atomically(
            path, serialize_golden(merge_golden(old, engine.device.type, new)).encode(), preserve=True
        )
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); name another --output") from None


def _entry(
    name: str, config: ServiceConfig, plan: EvaluatorPlan | None, table: Calibration, problem: str | None
) -> EvaluatorEntry:
    evaluator = config.evaluators[name]
    tower, scale = config.towers[evaluator.tower], table.evaluators.get(name)
    fingerprint = plan.fingerprint if plan else None
    return EvaluatorEntry(
        name=name,
        kind=evaluator.kind,
        formula=FORMULAS[evaluator.kind],
        enabled=evaluator.enabled,
        weight=evaluator.weight,
        tower=evaluator.tower,
        weights=f"{tower.origin}/{tower.weights.file}",
        weights_sha256=_sha256(plan.tower.weights if plan else None, tower.weights.sha256),
        head=_head_source(evaluator),
        head_sha256=_sha256(
            plan.head if plan else None, evaluator.head.weights.sha256 if evaluator.head else None
        ),
        preprocessing=_preprocessing(plan),
        tokenizer=plan.tower.tokenizer_description if plan else None,
        dtype=str(plan.dtype).removeprefix("torch.") if plan else None,
        fingerprint=fingerprint,
        calibration=scale.identity if scale else None,
        provisional=table.is_provisional(name, fingerprint) if scale and fingerprint else None,
        problem=problem,
    )


def _sha256(file: LocalFile | None, configured: str | None) -> str | None:
    return file.sha256 if file else configured


def _head_source(evaluator: EvaluatorConfig) -> str | None:
    head = evaluator.head
    return f"{head.origin}/{head.weights.file}" if head else None


def _preprocessing(plan: EvaluatorPlan | None) -> PreprocessingEntry | None:
    if plan is None:
        return None
    steps = plan.preprocessing
    return PreprocessingEntry(steps.method, steps.size_px, steps.antialias)


def _lines(entry: EvaluatorEntry) -> list[tuple[str, str]]:
    steps = entry.preprocessing
    lines: list[tuple[str, Any]] = [
        ("fingerprint", entry.fingerprint),
        ("kind", f"{entry.kind}: {entry.formula}"),
        ("tower", entry.tower),
        ("weights", _short(entry.weights, entry.weights_sha256)),
        ("head", entry.head and _short(entry.head, entry.head_sha256)),
        (
            "preprocessing",
            steps and f"{steps.method} {steps.size_px} px, antialias {'yes' if steps.antialias else 'no'}",
        ),
        ("tokenizer", entry.tokenizer),
        ("dtype", entry.dtype and f"{entry.dtype} trunk, float32 head and cosine"),
        ("calibration", entry.calibration and f"{entry.calibration}{_SCALE_STATE[entry.provisional]}"),
        ("missing", entry.problem),
    ]
    return [(label, str(value)) for label, value in lines if value]


def _short(source: str, sha256: str | None) -> str:
    return f"{source} ({sha256[:_SHORT_HASH] if sha256 else 'hash not pinned'})"
