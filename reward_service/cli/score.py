"""Offline scoring of image files: the checks and the numbers of the service, without a server."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import msgspec
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
from reward_service.requests.parsing import DecodedRequest, RequestParser
from reward_service.runtime.console import open_console
from reward_service.runtime.text_files import require_unicode
from reward_service.scoring.calibration import load_calibration
from reward_service.scoring.responses import identities, item_results
from reward_service.settings import ConfigError

Style = Literal["table", "json", "csv"]


@dataclass(frozen=True)
class OfflineRequest:
    """Image files, one prompt for all or one per image, and the options of a score request."""

    paths: tuple[Path, ...]
    prompts: tuple[str, ...]
    evaluators: tuple[str, ...] | None = None
    normalization: Normalization = "unit"
    deterministic: bool = False


@dataclass(frozen=True)
class OfflineReport:
    """Response to an offline request. `provisional` names the evaluators with a provisional calibration."""

    request: OfflineRequest
    response: ScoreResponse
    provisional: tuple[str, ...]
    provenance: str


def score_files(
    config: ServiceConfig, request: OfflineRequest, progress: Callable[[str], None]
) -> OfflineReport:
    """Score image files as the service would.

    Raises:
        ConfigError: a prompt, an image or a model is not usable
    """
    prompts = _prompt_per_image(request)
    _check_exist(request.paths)
    calibration = load_calibration(config.calibration, tuple(config.enabled))
    batches = _decoded_batches(config, request, prompts)
    first = next(batches)  # errors in the first images are reported before the models are loaded
    from reward_service.engine.loading import build_engine
    from reward_service.engine.types import ModelError

    try:
        engine = build_engine(config, progress)
        results: list[ItemResult] = []
        for batch in chain([first], batches):
            scores = engine.score(batch.pairs, batch.evaluators, deterministic=batch.deterministic)
            results += item_results(batch, scores, calibration, first=len(results))
    except (ModelError, ScoringError) as error:
        raise ConfigError(str(error)) from None
    fingerprints = {name: engine.evaluators[name].fingerprint for name in first.evaluators}
    if warning := calibration.variant_warning(fingerprints):
        progress(f"warning: {warning}")
    response = ScoreResponse("offline", results, identities(fingerprints, calibration), {})
    provisional = tuple(name for name, it in fingerprints.items() if calibration.is_provisional(name, it))
    return OfflineReport(request, response, provisional, calibration.provenance)


def print_scores(report: OfflineReport, style: Style) -> None:
    """Print a table, the response as JSON, or one CSV row per image."""
    if style == "json":
        print(msgspec.json.encode(report.response).decode())
    elif style == "csv":
        _print_csv(report)
    else:
        _print_table(report)


def _prompt_per_image(request: OfflineRequest) -> Sequence[str]:
    for name in request.evaluators or ():
        require_unicode(name, "--evaluators")
    for prompt in request.prompts:
        require_unicode(prompt, "a prompt")
        if not prompt:
            raise ConfigError("the prompt is empty; give it words")
    images, prompts = len(request.paths), len(request.prompts)
    if prompts == 1:
        return request.prompts * images
    if prompts != images:
        raise ConfigError(
            f"{prompts} prompts for {images} images; give one --prompt for all, or one per image"
        )
    return request.prompts


def _check_exist(paths: Sequence[Path]) -> None:
    for path in paths:
        try:
            reason = None if path.is_file() else "not a file" if path.exists() else "no such file"
        except OSError as error:  # the name is too long
            reason = error.strerror
        if reason:
            raise ConfigError(f"{path} cannot be read ({reason}); check the path")


def _decoded_batches(
    config: ServiceConfig, request: OfflineRequest, prompts: Sequence[str]
) -> Iterator[DecodedRequest]:
    """Yield the images as requests of the service, so that only one batch is in memory."""
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
            # Encoded and decoded as over HTTP, so that the schema's limits hold here too.
            yield parser(encode(body, MSGPACK), MSGPACK)
        except ProblemError as error:
            raise ConfigError(_problem_message(error, paths)) from None


def _problem_message(error: ProblemError, paths: Sequence[Path]) -> str:
    first = error.items[0] if error.items else None
    if first is None or first.index is None:
        return first.detail if first else error.detail
    return f"{paths[first.index]}: {first.detail}"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or error}); check the path") from None


def _print_csv(report: OfflineReport) -> None:
    names = list(report.response.evaluators)
    parts = ("raw", "z", "unit")
    writer = csv.writer(sys.stdout, lineterminator="\n")
    columns = ["path", "prompt", "reward", *(f"{name}_{part}" for name in names for part in parts)]
    identity_columns = [
        f"{name}_{part}" for name in names for part in ("fingerprint", "calibration", "provisional")
    ]
    writer.writerow([*columns, "truncated_prompt", "lossy_input", *identity_columns])
    identity: list[str] = []
    for name, it in report.response.evaluators.items():
        identity += [it.fingerprint, it.calibration, _csv_bool(name in report.provisional)]
    pairs = zip(report.request.paths, _prompt_per_image(report.request), report.response.results, strict=True)
    for path, prompt, result in pairs:
        scores = [getattr(result.scores[name], part) for name in names for part in parts]
        flags = [_csv_bool(result.truncated_prompt), _csv_bool(result.lossy_input)]
        writer.writerow([path, prompt, result.reward, *scores, *flags, *identity])


def _csv_bool(value: bool) -> str:
    return "true" if value else "false"


def _print_table(report: OfflineReport) -> None:
    table = Table("image", "evaluator", "raw", "z", "unit")
    for path, result in zip(report.request.paths, report.response.results, strict=True):
        image = Text(path.name)  # a name may contain [brackets], which are markup in a plain string
        for name, score in result.scores.items():
            table.add_row(image, name, f"{score.raw:.4f}", f"{score.z:+.2f}", f"{score.unit:.3f}")
        table.add_row(image, "reward", "", "", f"{result.reward:.3f}", end_section=True)
    open_console().print(table)
    if report.provisional:
        names = ", ".join(report.provisional)
        print(f"provisional scales: {names} ({report.provenance.rstrip('.')})")
    if any(result.truncated_prompt for result in report.response.results):
        print("the prompt is longer than an evaluator's limit; its end was cut off", file=sys.stderr)
