"""`reward-service calibrate`: a user's own images to a table that a configuration can name.

Score listed images into a file of scores, batch by batch; what the file has is not scored again.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from reward_service.calibrate.inputs import Choice, Format, Listed, check_files, read_choices, read_images
from reward_service.calibrate.score_log import Book, Key, Scored, Writer, merge, open_book, stamp
from reward_service.calibrate.statistics import RESAMPLES
from reward_service.calibrate.tables import Deviation, Json, tabulate
from reward_service.config import ServiceConfig
from reward_service.engine.loading import build_engine
from reward_service.engine.types import Pair, ScoringError
from reward_service.engine.weights import ModelError
from reward_service.images import ImageError, Pixels, decode
from reward_service.settings import ConfigError

Read = Callable[[Listed], Pixels]


def survey(
    config: ServiceConfig,
    names: Sequence[str],
    folder: Path,
    sources: Mapping[Path, Sequence[Listed]],
    pairs_only: frozenset[Key],
    path: Path,
    note: Callable[[str], None],
    *,
    deterministic: bool = False,
) -> Book:
    """Score what is listed by the named evaluators, in forward passes of `config.batch_pairs`.

    At most two batches of images are in memory.

    Args:
        sources: the files that listed the images, for messages
        pairs_only: keys of images that belong to no group of the calibration
        path: the file of scores to begin or to go on with

    Raises:
        ConfigError: a model, an image or the file cannot be used
    """
    try:
        engine = build_engine(config, note)
    except ModelError as error:
        raise ConfigError(str(error)) from None
    fingerprints = {name: engine.evaluators[name].fingerprint for name in names}
    origin = {row.key: (source, row) for source, rows in sources.items() for row in rows}
    rows = [row for _, row in origin.values()]

    def read(row: Listed) -> Pixels:
        return _read(folder / row.image, config, f"{origin[row.key][0]}: line {row.line}")

    with open_book(path, fingerprints) as writer, tqdm(total=len(rows), unit="picture") as progress:
        todo = _outstanding(writer, rows, folder, pairs_only)
        progress.update(len(rows) - len(todo))
        for batch in _decoded(todo, read, config.decode_threads, config.batch_pairs):
            pairs = [Pair(row.prompt, image) for row, image in batch]
            try:
                found = engine.score(pairs, names, deterministic=deterministic)
            except ScoringError as error:
                first, last = batch[0][0], batch[-1][0]
                raise ConfigError(f"{first.image} to {last.image}: {error}; check the weights") from None
            writer.add(
                Scored(
                    *(row.image, row.prompt, row.group, tuple(scores.raw[name] for name in names)),
                    *(scores.truncated_prompt, stamp(folder / row.image), row.key in pairs_only),
                )
                for (row, _), scores in zip(batch, found, strict=True)
            )
            progress.update(len(batch))
    return writer.book


def _outstanding(
    writer: Writer, rows: Sequence[Listed], folder: Path, pairs_only: frozenset[Key]
) -> list[Listed]:
    """What is still to be scored; a scored image of the same file in another group is only noted so."""
    todo, regrouped = [], []
    for row in rows:
        known = writer.book.rows.get(row.key)
        if known is None or known.stamp != stamp(folder / row.image):
            todo.append(row)
        elif (known.group, known.pairs_only) != (row.group, row.key in pairs_only):
            regrouped.append(replace(known, group=row.group, pairs_only=row.key in pairs_only))
    writer.add(regrouped)
    return todo


def _decoded(
    rows: Sequence[Listed], read: Read, threads: int, size: int
) -> Iterator[list[tuple[Listed, Pixels]]]:
    """Batches of decoded images; the next one is decoded while the caller works on this one."""
    waiting = iter(rows)
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        ahead: deque[tuple[Listed, Future[Pixels]]] = deque()
        try:
            while True:
                ahead += [(row, pool.submit(read, row)) for row in islice(waiting, 2 * size - len(ahead))]
                if not ahead:
                    return
                yield [(row, image.result()) for row, image in _taken(ahead, size)]
        finally:
            pool.shutdown(cancel_futures=True)


def _taken(ahead: deque[tuple[Listed, Future[Pixels]]], size: int) -> list[tuple[Listed, Future[Pixels]]]:
    return [ahead.popleft() for _ in range(min(size, len(ahead)))]


def _read(path: Path, config: ServiceConfig, where: str) -> Pixels:
    try:
        return decode(path.read_bytes(), max_pixels=config.limits.max_image_pixels).rgb
    except OSError as error:
        raise ConfigError(f"{where}: {path} cannot be read ({error.strerror or error})") from None
    except ImageError as error:
        raise ConfigError(f"{where}: {path}: {error}") from None


@dataclass(frozen=True)
class Request:
    """What to calibrate from.

    With `images` images are scored, into the one file of `scores` or one beside `output`; without,
    `scores` are files of scores to be merged.
    """

    output: Path
    images: Path | None = None
    prompts: Path | None = None
    pairs: Path | None = None
    scores: tuple[Path, ...] = ()
    form: Format | None = None
    evaluators: tuple[str, ...] | None = None
    std: Deviation = "within"
    seed: int = 0
    resamples: int = RESAMPLES
    deterministic: bool = False
    force: bool = False


def calibrate(
    request: Request, configuration: Callable[[], ServiceConfig], note: Callable[[str], None]
) -> Json:
    """Score what is to be scored, write the table, and return it.

    Args:
        configuration: asked only if images are to be scored

    Raises:
        ConfigError: whatever the user can mend
    """
    _check(request)
    images = read_images(request.prompts, request.form) if request.prompts else []
    choices = read_choices(request.pairs, request.form) if request.pairs else []
    if request.images is not None:
        book = _score(request, request.images, images, choices, configuration(), note)
        rows = [book.rows[row.key] for row in images or _distinct(choices)]
    else:
        book = _cut(merge(request.scores), request.evaluators)
        rows = [row for row in book.rows.values() if not row.pairs_only]
    table = tabulate(
        book,
        rows,
        [_keys(choice, book, request) for choice in choices],
        std=request.std,
        seed=request.seed,
        resamples=request.resamples,
    )
    _write(request.output, table)
    for line in table["warnings"]:
        note(f"warning: {line}")
    return table


def _check(request: Request) -> None:
    if request.images is None:
        if request.prompts is not None:
            raise ConfigError("--prompts lists images to score; name their folder with --images")
        if not request.scores:
            raise ConfigError(
                "nothing to calibrate from; give --images with --prompts or --pairs, or --scores"
            )
    elif request.prompts is None and request.pairs is None:
        raise ConfigError("--images needs the images' prompts; give --prompts or --pairs")
    elif len(request.scores) > 1:
        raise ConfigError("with --images one --scores file is written; leave --images out to merge several")
    output = request.output
    if not output.parent.is_dir() or output.is_dir():
        raise ConfigError(f"{output}: cannot be written; name a file in a folder that is there with --output")
    if output.exists() and not request.force:
        raise ConfigError(f"{output}: is there already; name another --output, or add --force")


def _score(
    request: Request,
    images: Path,
    pixels: Sequence[Listed],
    choices: Sequence[Choice],
    config: ServiceConfig,
    note: Callable[[str], None],
) -> Book:
    sources: dict[Path, Sequence[Listed]] = {}
    compared = _distinct(choices)
    if request.pairs is not None:
        sources[request.pairs] = compared
    if request.prompts is not None:  # after the pairs: an image in both belongs to its prompt's group
        sources[request.prompts] = pixels
    for source, listed in sources.items():
        check_files(images, listed, source)
    names = _names(request.evaluators, tuple(config.enabled))
    only = {row.key for row in compared} - {row.key for row in pixels} if pixels else set()
    path = request.scores[0] if request.scores else Path(f"{request.output}.scores.jsonl")
    return survey(
        config, names, images, sources, frozenset(only), path, note, deterministic=request.deterministic
    )


def _distinct(choices: Sequence[Choice]) -> list[Listed]:
    rows = [row for choice in choices for row in (choice.preferred, choice.rejected)]
    return list({row.key: row for row in rows}.values())


def _names(asked: Sequence[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    for name in asked or ():
        if name not in known:
            raise ConfigError(f"--evaluators: there is no {name!r} here; choose from {', '.join(known)}")
    return tuple(name for name in known if asked is None or name in asked)


def _cut(book: Book, asked: Sequence[str] | None) -> Book:
    """The book of the evaluators asked for."""
    known = tuple(book.fingerprints)
    names = _names(asked, known)
    if names == known:
        return book
    columns = [known.index(name) for name in names]
    rows = {key: _columns(row, columns) for key, row in book.rows.items()}
    return Book({name: book.fingerprints[name] for name in names}, rows)


def _columns(row: Scored, columns: Sequence[int]) -> Scored:
    return replace(row, raw=tuple(row.raw[column] for column in columns))


def _keys(choice: Choice, book: Book, request: Request) -> tuple[Key, Key, float]:
    for row in (choice.preferred, choice.rejected):
        if row.key not in book.rows:
            message = f"{row.image} by this prompt is in none of the --scores files; score it with --images"
            raise ConfigError(f"{request.pairs}: line {row.line}: {message}")
    return choice.preferred.key, choice.rejected.key, choice.weight


def _write(path: Path, table: Json) -> None:
    """Whole or not at all: a reader never sees half a table."""
    text = json.dumps(table, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(file.name).chmod(0o644)  # a temporary file is its owner's alone
        Path(file.name).replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error})") from None
