"""What is configured, and its files: `reward-service evaluators` and `reward-service download`.

`reward-service canary`: score the canary pair, compare it with the golden scores, or write them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reward_service.config import EvaluatorConfig, ServiceConfig
from reward_service.engine.evaluators import FORMULAS
from reward_service.engine.files import Files, LocalFile, ModelError, Note
from reward_service.engine.loading import EvaluatorPlan, build_engine, check_models, plan_evaluators
from reward_service.scoring.breaker import EvaluatorBreakers
from reward_service.scoring.calibration import Calibration, load_calibration
from reward_service.scoring.canary import Golden, GoldenScores, canary_pair, dumps, load_golden, merged
from reward_service.settings import ConfigError


def compare(config: ServiceConfig, note: Note, say: Callable[[str], None]) -> str | None:
    """Score the canary and say each score with its golden one.

    Returns:
        one line if a score is not its golden one

    Raises:
        ConfigError: the models or the file cannot be used
    """
    golden = load_golden(config.canary) if config.canary else None
    engine = build_engine(config, note)
    breakers = EvaluatorBreakers(engine, golden)
    lines = breakers.prove()
    for name, score in engine.score([breakers.canary], deterministic=True)[0].raw.items():
        known = "no golden score" if name in breakers.unproven() else "golden"
        say(f"{name:<10} {score:.7g}  {known}  {engine.evaluators[name].fingerprint}")
    return "; ".join(lines) or None


def write(config: ServiceConfig, path: Path, note: Note) -> None:
    """Write the canary's scores as golden ones; those of other devices and fingerprints stay in the file.

    Raises:
        ConfigError: the models cannot be used, or the file cannot be written
    """
    old: GoldenScores | None = load_golden(path) if path.exists() else None
    engine = build_engine(config, note)
    raw = engine.score([canary_pair()], deterministic=True)[0].raw
    known = [(engine.evaluators[name].fingerprint, Golden(evaluator=name, raw=raw[name])) for name in raw]
    try:
        path.write_text(dumps(merged(old, engine.device.type, known)), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); name another --output") from None


_SHORT = 12
_SCALE_STATE = {True: ", provisional", False: ", measured", None: ""}


@dataclass(frozen=True)
class Preprocessing:
    """How images are prepared."""

    method: str
    size_px: int
    antialias: bool


@dataclass(frozen=True)
class Entry:
    """One evaluator of the configuration.

    What its files decide is None where they are not at hand, which is a fault only if it is enabled;
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
    preprocessing: Preprocessing | None
    tokenizer: str | None
    dtype: str | None
    fingerprint: str | None
    calibration: str | None
    provisional: bool | None
    problem: str | None


def list_evaluators(config: ServiceConfig, note: Note) -> list[Entry]:
    """Every configured evaluator, without reading weights or fetching a file.

    Raises:
        ConfigError: an enabled one is not at hand or unusable, or the calibration table is
    """
    table = load_calibration(config.calibration, tuple(config.enabled))
    files = Files(note, download=False)
    plans = plan_evaluators(config, files, config.enabled)
    check_models(plans)
    problems: dict[str, str] = {}
    for name in config.evaluators.keys() - plans.keys():
        try:
            plans |= plan_evaluators(config, files, (name,))
        except ModelError as error:
            problems[name] = str(error)
    return [_entry(name, config, plans.get(name), table, problems.get(name)) for name in config.evaluators]


def print_evaluators(entries: Sequence[Entry], *, as_json: bool) -> None:
    """Print a paragraph for each, or JSON on one line."""
    if as_json:
        print(json.dumps({"evaluators": [asdict(entry) for entry in entries]}, ensure_ascii=False))
        return
    for entry in entries:
        print(entry.name if entry.enabled else f"{entry.name} (off)")
        for label, value in _lines(entry):
            print(f"  {label:<14} {value}")


def download(config: ServiceConfig, names: Sequence[str], note: Note, say: Callable[[str], None]) -> None:
    """Fetch and check every file of the named evaluators, and say each with its size and hash.

    Raises:
        ConfigError: one cannot be had, or is not what the configuration expects
    """
    plans = plan_evaluators(config, Files(note), names)
    check_models(plans)
    files = {file.path: file for plan in plans.values() for file in plan.files}
    for file in files.values():
        say(f"{file.sha256}  {file.size_bytes:>13,}  {file.source}")
    total = sum(file.size_bytes for file in files.values())
    say(f"{len(files)} files, {total:,} bytes in all; ready to serve {', '.join(names)}")


def _entry(
    name: str, config: ServiceConfig, plan: EvaluatorPlan | None, table: Calibration, problem: str | None
) -> Entry:
    evaluator = config.evaluators[name]
    tower, scale = config.towers[evaluator.tower], table.evaluators.get(name)
    fingerprint = plan.fingerprint if plan else None
    return Entry(
        name=name,
        kind=evaluator.kind,
        formula=FORMULAS[evaluator.kind],
        enabled=evaluator.enabled,
        weight=evaluator.weight,
        tower=evaluator.tower,
        weights=f"{tower.origin}/{tower.weights.file}",
        weights_sha256=_known(plan.tower.weights if plan else None, tower.weights.sha256),
        head=_head_source(evaluator),
        head_sha256=_known(
            plan.head if plan else None, evaluator.head.weights.sha256 if evaluator.head else None
        ),
        preprocessing=_preprocessing(plan),
        tokenizer=plan.tower.tokenizer if plan else None,
        dtype=str(plan.dtype).removeprefix("torch.") if plan else None,
        fingerprint=fingerprint,
        calibration=scale.identity if scale else None,
        provisional=table.provisional_for(name, fingerprint) if scale and fingerprint else None,
        problem=problem,
    )


def _known(file: LocalFile | None, configured: str | None) -> str | None:
    return file.sha256 if file else configured


def _head_source(evaluator: EvaluatorConfig) -> str | None:
    head = evaluator.head
    return f"{head.origin}/{head.weights.file}" if head else None


def _preprocessing(plan: EvaluatorPlan | None) -> Preprocessing | None:
    if plan is None:
        return None
    way = plan.preprocessing
    return Preprocessing(way.method, way.size_px, way.antialias)


def _lines(entry: Entry) -> list[tuple[str, str]]:
    way = entry.preprocessing
    lines: list[tuple[str, Any]] = [
        ("fingerprint", entry.fingerprint),
        ("kind", f"{entry.kind}: {entry.formula}"),
        ("tower", entry.tower),
        ("weights", _short(entry.weights, entry.weights_sha256)),
        ("head", entry.head and _short(entry.head, entry.head_sha256)),
        (
            "preprocessing",
            way and f"{way.method} {way.size_px} px, antialias {'yes' if way.antialias else 'no'}",
        ),
        ("tokenizer", entry.tokenizer),
        ("dtype", entry.dtype and f"{entry.dtype} trunk, float32 head and cosine"),
        ("calibration", entry.calibration and f"{entry.calibration}{_SCALE_STATE[entry.provisional]}"),
        ("not at hand", entry.problem),
    ]
    return [(label, str(value)) for label, value in lines if value]


def _short(source: str, sha256: str | None) -> str:
    return f"{source} ({sha256[:_SHORT] if sha256 else 'hash not pinned'})"
