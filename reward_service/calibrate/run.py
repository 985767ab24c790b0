"""Calibration run: score a user's images, or merge score files, and write the calibration table.

Images are scored batch by batch into a score file; those that the file already contains are not scored again.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from reward_service.calibrate.inputs import (
    FileFormat,
    ListedImage,
    PairKey,
    PreferencePair,
    check_images_exist,
    read_images,
    read_preferences,
)
from reward_service.calibrate.score_log import (
    ScoredImage,
    ScoreSet,
    ScoreWriter,
    file_stamp,
    merge_score_files,
    open_score_file,
)
from reward_service.calibrate.statistics import RESAMPLES
from reward_service.calibrate.tables import Json, StdKind, build_table
from reward_service.config import ServiceConfig
from reward_service.engine.engine import RewardEngine
from reward_service.engine.loading import build_engine
from reward_service.engine.types import ModelError, Pair, PairScores, ScoringError
from reward_service.files import write_atomically
from reward_service.images import ImageError, Pixels, decode
from reward_service.runtime.progress import progress as progress_bar
from reward_service.settings import ConfigError


@dataclass(frozen=True)
class CalibrationRequest:
    """Inputs, output and options of a calibration.

    With `images`, the images are scored into a score file: the only one of `scores`, or one beside `output`.
    Without, `scores` are score files to merge.
    """

    output: Path
    images: Path | None = None
    prompts: Path | None = None
    pairs: Path | None = None
    scores: tuple[Path, ...] = ()
    file_format: FileFormat | None = None
    evaluators: tuple[str, ...] | None = None
    std: StdKind = "within"
    seed: int = 0
    resamples: int = RESAMPLES
    deterministic: bool = False
    force: bool = False


def calibrate(
    request: CalibrationRequest,
    load_config: Callable[[], ServiceConfig],
    progress: Callable[[str], None],
) -> Json:
    """Score images if there are any, write the calibration table, and return it.

    Args:
        request: inputs, output and options
        load_config: called only if images are to be scored
        progress: receives progress reports and warnings

    Raises:
        ConfigError: any error that the user can fix
    """
    _check_request(request)
    images = read_images(request.prompts, request.file_format) if request.prompts else []
    preferences = read_preferences(request.pairs, request.file_format) if request.pairs else []
    if request.images is not None:
        scores = _score(request, request.images, images, preferences, load_config(), progress)
        rows = [scores.rows[image.key] for image in images or _images_of(preferences)]
    else:
        scores = _select_evaluators(merge_score_files(request.scores), request.evaluators)
        rows = [row for row in scores.rows.values() if not row.pairs_only]
    table = build_table(
        scores,
        rows,
        [_keys(pair, scores, request) for pair in preferences],
        std=request.std,
        seed=request.seed,
        resamples=request.resamples,
    )
    _write_table(request.output, table)
    for line in table["warnings"]:
        progress(f"warning: {line}")
    return table


def _check_request(request: CalibrationRequest) -> None:
    if request.images is None:
        if request.prompts is not None:
            raise ConfigError("--prompts lists images to score; name their folder with --images")
        if not request.scores:
            raise ConfigError("no input; give --images with --prompts or --pairs, or --scores")
    elif request.prompts is None and request.pairs is None:
        raise ConfigError("--images needs the images' prompts; give --prompts or --pairs")
    elif len(request.scores) > 1:
        raise ConfigError("--images writes to one --scores file; to merge several, omit --images")
    output = request.output
    if not output.parent.is_dir() or output.is_dir():
        raise ConfigError(f"{output}: cannot be written; name a file in an existing folder with --output")
    if output.exists() and not request.force:
        raise ConfigError(f"{output}: already exists; name another --output, or add --force")


def _score(
    request: CalibrationRequest,
    folder: Path,
    images: Sequence[ListedImage],
    preferences: Sequence[PreferencePair],
    config: ServiceConfig,
    progress: Callable[[str], None],
) -> ScoreSet:
    sources: dict[Path, Sequence[ListedImage]] = {}
    compared = _images_of(preferences)
    if request.pairs is not None:
        sources[request.pairs] = compared
    if request.prompts is not None:  # after the pairs: an image in both belongs to its prompt's group
        sources[request.prompts] = images
    for source, listed in sources.items():
        check_images_exist(folder, listed, source)
    pairs_only = {image.key for image in compared} - {image.key for image in images} if images else set()
    return score_images(
        config,
        _select_names(request.evaluators, tuple(config.enabled)),
        folder,
        sources,
        frozenset(pairs_only),
        request.scores[0] if request.scores else Path(f"{request.output}.scores.jsonl"),
        progress,
        deterministic=request.deterministic,
    )


def _images_of(preferences: Sequence[PreferencePair]) -> list[ListedImage]:
    images = [image for pair in preferences for image in (pair.preferred, pair.rejected)]
    return list({image.key: image for image in images}.values())


def _select_names(requested: Sequence[str] | None, available: Sequence[str]) -> tuple[str, ...]:
    for name in requested or ():
        if name not in available:
            raise ConfigError(f"--evaluators: unknown evaluator {name!r}; choose from {', '.join(available)}")
    return tuple(name for name in available if requested is None or name in requested)


def _select_evaluators(scores: ScoreSet, requested: Sequence[str] | None) -> ScoreSet:
    available = tuple(scores.fingerprints)
    names = _select_names(requested, available)
    if names == available:
        return scores
    columns = [available.index(name) for name in names]
    rows = {
        key: replace(row, raw=tuple(row.raw[column] for column in columns))
        for key, row in scores.rows.items()
    }
    return ScoreSet({name: scores.fingerprints[name] for name in names}, rows)


def _keys(
    pair: PreferencePair, scores: ScoreSet, request: CalibrationRequest
) -> tuple[PairKey, PairKey, float]:
    for image in (pair.preferred, pair.rejected):
        if image.key not in scores.rows:
            message = f"no --scores file has {image.image} with this prompt; score it with --images"
            raise ConfigError(f"{request.pairs}: line {image.line}: {message}")
    return pair.preferred.key, pair.rejected.key, pair.weight


def _write_table(path: Path, table: Json) -> None:
    text = json.dumps(table, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error})") from None


def score_images(
    config: ServiceConfig,
    names: Sequence[str],
    folder: Path,
    sources: Mapping[Path, Sequence[ListedImage]],
    pairs_only: frozenset[PairKey],
    path: Path,
    progress: Callable[[str], None],
    *,
    deterministic: bool = False,
) -> ScoreSet:
    """Score the listed images, in forward passes of `config.batch_pairs`; at most two batches are in memory.

    Args:
        config: configuration of the service
        names: evaluators that score
        folder: the folder that the images' paths are relative to
        sources: listed images by the file that lists them, which messages name
        pairs_only: keys of images that mean and deviations are not computed from
        path: the score file to create or to continue
        progress: receives progress reports of loading
        deterministic: make scores independent of the batches; slower

    Raises:
        ConfigError: a model, an image or the score file is not usable
    """
    try:
        engine = build_engine(config, progress)
    except ModelError as error:
        raise ConfigError(str(error)) from None
    fingerprints = {name: engine.evaluators[name].fingerprint for name in names}
    listed = {image.key: (source, image) for source, images in sources.items() for image in images}
    images = [image for _, image in listed.values()]

    def read(image: ListedImage) -> Pixels:
        source, _ = listed[image.key]
        return _read_image(folder / image.image, config, f"{source}: line {image.line}")

    with ExitStack() as stack:
        writer = stack.enter_context(open_score_file(path, fingerprints))
        unscored = _unscored(writer, images, folder, pairs_only)
        done = len(images) - len(unscored)
        bar = stack.enter_context(progress_bar(len(images), "scoring", "image", done=done))
        for batch in _decoded_batches(unscored, read, config.decode_threads, config.batch_pairs):
            results = _score_batch(engine, names, batch, deterministic=deterministic)
            writer.append(
                ScoredImage(
                    image=image.image,
                    prompt=image.prompt,
                    group=image.group,
                    raw=tuple(result.raw[name] for name in names),
                    truncated=result.truncated_prompt,
                    stamp=file_stamp(folder / image.image),
                    pairs_only=image.key in pairs_only,
                )
                for (image, _), result in zip(batch, results, strict=True)
            )
            bar.update(len(batch))
    progress(f"{path}: {len(unscored)} images scored, {done} were there")
    return writer.scores


def _unscored(
    writer: ScoreWriter, images: Sequence[ListedImage], folder: Path, pairs_only: frozenset[PairKey]
) -> list[ListedImage]:
    """Return the images to score; a scored image that only changed its group is appended with the new one."""
    unscored, regrouped = [], []
    for image in images:
        row = writer.scores.rows.get(image.key)
        if row is None or row.stamp != file_stamp(folder / image.image):
            unscored.append(image)
        elif (row.group, row.pairs_only) != (image.group, image.key in pairs_only):
            regrouped.append(replace(row, group=image.group, pairs_only=image.key in pairs_only))
    writer.append(regrouped)
    return unscored


def _decoded_batches(
    images: Sequence[ListedImage], read: Callable[[ListedImage], Pixels], threads: int, size: int
) -> Iterator[list[tuple[ListedImage, Pixels]]]:
    """Yield batches of decoded images; the next batch is decoded while the current one is scored."""
    remaining = iter(images)
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        pending: deque[tuple[ListedImage, Future[Pixels]]] = deque()
        try:
            while True:
                free = 2 * size - len(pending)
                pending += [(image, pool.submit(read, image)) for image in islice(remaining, free)]
                if not pending:
                    return
                batch = (pending.popleft() for _ in range(min(size, len(pending))))
                yield [(image, pixels.result()) for image, pixels in batch]
        finally:
            pool.shutdown(cancel_futures=True)


def _score_batch(
    engine: RewardEngine,
    names: Sequence[str],
    batch: Sequence[tuple[ListedImage, Pixels]],
    *,
    deterministic: bool,
) -> list[PairScores]:
    pairs = [Pair(image.prompt, pixels) for image, pixels in batch]
    try:
        return engine.score(pairs, names, deterministic=deterministic)
    except ScoringError as error:
        first, last = batch[0][0], batch[-1][0]
        raise ConfigError(f"{first.image} to {last.image}: {error}; check the weights") from None


def _read_image(path: Path, config: ServiceConfig, origin: str) -> Pixels:
    try:
        return decode(path.read_bytes(), max_pixels=config.limits.max_image_pixels).rgb
    except OSError as error:
        raise ConfigError(f"{origin}: {path} cannot be read ({error.strerror or error})") from None
    except ImageError as error:
        raise ConfigError(f"{origin}: {path}: {error}") from None
