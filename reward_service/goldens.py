"""``reward-service canary``: score the canary pair, compare it with the golden scores, or write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from reward_service.canary import (
    Golden,
    GoldenScores,
    canary_pair,
    dumps,
    load_golden,
    merged,
)
from reward_service.config import ServiceConfig
from reward_service.files import Note
from reward_service.guard import Guard
from reward_service.loading import build_engine
from reward_service.settings import ConfigError


def compare(config: ServiceConfig, note: Note, say: Callable[[str], None]) -> str | None:
    """Score the canary and say each score with its golden one.

    :returns: one line if a score is not its golden one
    :raises ConfigError: the models or the file cannot be used
    """
    golden = load_golden(config.canary) if config.canary else None
    engine = build_engine(config, note)
    guard = Guard(engine, golden)
    lines = guard.prove()
    for name, score in engine.score([guard.canary], deterministic=True)[0].raw.items():
        known = "no golden score" if name in guard.unproven() else "golden"
        say(f"{name:<10} {score:.7g}  {known}  {engine.evaluators[name].fingerprint}")
    return "; ".join(lines) or None


def write(config: ServiceConfig, path: Path, note: Note) -> None:
    """Write the canary's scores as golden ones; those of other devices and fingerprints stay in the file.

    :raises ConfigError: the models cannot be used, or the file cannot be written
    """
    old: GoldenScores | None = load_golden(path) if path.exists() else None
    engine = build_engine(config, note)
    raw = engine.score([canary_pair()], deterministic=True)[0].raw
    known = [(engine.evaluators[name].fingerprint, Golden(evaluator=name, raw=raw[name])) for name in raw]
    try:
        path.write_text(dumps(merged(old, engine.device.type, known)), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); name another --output") from None
