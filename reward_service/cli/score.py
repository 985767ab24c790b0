"""Score images with the engine itself, no server in between; every check and number is the service's."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from reward_service.config import ServiceConfig
from reward_service.engine.types import ScoringError
from reward_service.protocol import (
    MSGPACK,
    Item,
    ItemResult,
    Normalization,
    Picture,
    ProblemError,
    ScoreRequest,
    ScoreResponse,
    encode,
)
from reward_service.scoring.calibration import Calibration, load_calibration
from reward_service.scoring.requests import DecodedRequest, RequestParser
from reward_service.scoring.responses import identities, item_results
from reward_service.settings import ConfigError

Style = Literal["table", "json", "csv"]


@dataclass(frozen=True)
class Request:
    """Images, one prompt for all of them or one each, and the request's own options."""

    paths: tuple[Path, ...]
    prompts: tuple[str, ...]
    evaluators: tuple[str, ...] | None = None
    normalization: Normalization = "unit"
    deterministic: bool = False


@dataclass(frozen=True)
class Report:
    """The response, and what it takes to show it. `provisional`: evaluators whose scale is a stand-in."""

    request: Request
    response: ScoreResponse
    provisional: tuple[str, ...]
    provenance: str


def score_files(config: ServiceConfig, request: Request, note: Callable[[str], None]) -> Report:
    """Score files as the service would.

    Raises:
        ConfigError: a prompt, an image or a model cannot be used
    """
    prompts = _prompt_each(request)
    _check_there(request.paths)
    calibration = load_calibration(config.calibration, tuple(config.enabled))
    parts = _admitted(config, request, prompts)
    first = next(parts)  # a mistake in the first images is told before models are loaded
    from reward_service.engine.loading import build_engine
    from reward_service.engine.weights import ModelError

    try:
        engine = build_engine(config, note)
        results: list[ItemResult] = []
        for part in chain([first], parts):
            scored = engine.score(part.pairs, part.evaluators, deterministic=part.deterministic)
            results += item_results(part, scored, calibration, first=len(results))
    except (ModelError, ScoringError) as error:
        raise ConfigError(str(error)) from None
    prints = {name: engine.evaluators[name].fingerprint for name in first.evaluators}
    if notice := calibration.notice(prints):
        note(f"warning: {notice}")
    response = ScoreResponse("offline", results, identities(prints, calibration), {})
    return Report(request, response, _provisional(calibration, prints), calibration.provenance)


def print_scores(report: Report, style: Style) -> None:
    """Print a table, the response as JSON, or one row of CSV for each image."""
    if style == "json":
        print(msgspec.json.encode(report.response).decode())
    elif style == "csv":
        _print_csv(report)
    else:
        _print_table(report)


def _prompt_each(request: Request) -> Sequence[str]:
    for prompt in request.prompts:
        if not prompt:
            raise ConfigError("the prompt is empty; give it words")
    images, prompts = len(request.paths), len(request.prompts)
    if prompts == 1:
        return request.prompts * images
    if prompts != images:
        raise ConfigError(f"{prompts} prompts for {images} images; give one --prompt for all, or one each")
    return request.prompts


def _check_there(paths: Sequence[Path]) -> None:
    for path in paths:
        try:
            reason = None if path.is_file() else "it is no file" if path.exists() else "no such file"
        except OSError as error:  # a name too long
            reason = error.strerror
        if reason:
            raise ConfigError(f"{path} cannot be read ({reason}); check the path")


def _admitted(config: ServiceConfig, request: Request, prompts: Sequence[str]) -> Iterator[DecodedRequest]:
    """The images as requests of the service, batch by batch, so that only one batch is in memory."""
    parser = RequestParser(config)
    size = min(config.batch_pairs, config.limits.max_pairs)
    for start in range(0, len(prompts), size):
        paths = request.paths[start : start + size]
        items = [
            Item(prompt, Picture(_read(path)))
            for path, prompt in zip(paths, prompts[start : start + size], strict=True)
        ]
        names = None if request.evaluators is None else list(request.evaluators)
        body = ScoreRequest(
            items, names, normalization=request.normalization, deterministic=request.deterministic
        )
        try:
            # Through the wire's own bytes: the schema's limits hold here too.
            yield parser(encode(body, MSGPACK), MSGPACK)
        except ProblemError as error:
            raise ConfigError(_told(error, paths)) from None
        except UnicodeEncodeError:
            raise ConfigError("a prompt is not text that can be written as UTF-8; correct it") from None


def _told(error: ProblemError, paths: Sequence[Path]) -> str:
    first = error.items[0] if error.items else None
    if first is None or first.index is None:
        return first.detail if first else error.detail
    return f"{paths[first.index]}: {first.detail}"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or error}); check the path") from None


def _provisional(calibration: Calibration, fingerprints: dict[str, str]) -> tuple[str, ...]:
    return tuple(
        name for name, fingerprint in fingerprints.items() if calibration.provisional_for(name, fingerprint)
    )


def _print_csv(report: Report) -> None:
    names = list(report.response.evaluators)
    parts = ("raw", "z", "unit")
    writer = csv.writer(sys.stdout, lineterminator="\n")
    columns = ["path", "prompt", "reward", *(f"{name}_{part}" for name in names for part in parts)]
    origins = [f"{name}_{part}" for name in names for part in ("fingerprint", "calibration", "provisional")]
    writer.writerow([*columns, "truncated_prompt", "lossy_input", *origins])
    identity: list[str] = []
    for name, it in report.response.evaluators.items():
        identity += [it.fingerprint, it.calibration, _yes(name in report.provisional)]
    pairs = zip(report.request.paths, _prompt_each(report.request), report.response.results, strict=True)
    for path, prompt, result in pairs:
        scores = [getattr(result.scores[name], part) for name in names for part in parts]
        marks = [_yes(result.truncated_prompt), _yes(result.lossy_input)]
        writer.writerow([path, prompt, result.reward, *scores, *marks, *identity])


def _yes(value: bool) -> str:
    return "true" if value else "false"


def _print_table(report: Report) -> None:
    table = Table("picture", "evaluator", "raw", "z", "unit")
    for path, result in zip(report.request.paths, report.response.results, strict=True):
        shown = Text(path.name)  # a name may hold [brackets], which are markup in a plain string
        for name, score in result.scores.items():
            table.add_row(shown, name, f"{score.raw:.4f}", f"{score.z:+.2f}", f"{score.unit:.3f}")
        table.add_row(shown, "reward", "", "", f"{result.reward:.3f}", end_section=True)
    Console().print(table)
    if report.provisional:
        names = ", ".join(report.provisional)
        print(f"provisional scales: {names} ({report.provenance.rstrip('.')})")
    if any(result.truncated_prompt for result in report.response.results):
        print("the prompt was longer than an evaluator reads; its end was cut off", file=sys.stderr)
