"""Prepare a prompt file from DiffusionDB's metadata.parquet (2 million rows): filter, deduplicate, sample.

One pass over three columns keeps the prompts that pass the filters; then near-duplicates are removed; then a
sample is taken. docs/prompts.md gives the reason for each filter. DiffusionDB (Wang et al. 2022) is CC0 1.0.
"""

import hashlib
import html
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from html.entities import html5
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.config import ConfigError
from trainer.data.near_duplicates import Features, remove_near_duplicates, words
from trainer.data.prompts import Prompt, normalize_text
from trainer.data.tokenizer import TokenCounter
from trainer.runtime.errors import reason
from trainer.runtime.files import write_atomically

REPOSITORY, METADATA = "poloclub/diffusiondb", "metadata.parquet"
COLUMNS = ("prompt", "user_name", "prompt_nsfw")
LICENCE = "CC0 1.0 (https://creativecommons.org/publicdomain/zero/1.0/)"
UNKNOWN_USERS = ("", "deleted_account")  # DiffusionDB's names for users whose account is gone
BATCH = 20_000  # rows read at once

# Reasons to leave a row out, in the order of the filters.
REJECTIONS = (
    NO_SCORE := "no prompt_nsfw from 0 to 1",
    UNSAFE := "prompt_nsfw above the limit",
    NO_PROMPT := "no prompt",
    NO_USER := "unknown user",
    DUPLICATE := "exact duplicate",
    SHORT := "too few words",
    LONG := "too many tokens",
    NEAR := "near-duplicate of one before",
    PER_USER := "beyond the user's share",
    UNSAMPLED := "not in the sample",
)

ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});")
INVISIBLE = ("Cc", "Cs")  # Unicode categories of control characters and surrogates

ALL_COMPARED = "all candidates were compared"
PART_COMPARED = (
    "so many prompts share their phrases that only part of the candidates were compared: some may be left"
)


@dataclass(frozen=True)
class Filters:
    """Limits for the prompts that are kept."""

    max_nsfw: float = 0.5  # prompt_nsfw, from 0 to 1
    min_words: int = 3  # of any script: see trainer.data.near_duplicates
    max_tokens: int = 77  # of Karlo's tokenizer, start and end included
    near_duplicate: float = 0.77  # similarity from which the later of two prompts is dropped, above 0 to 1
    per_user: int | None = None  # prompts of one user, selected by the seed; None: all
    sample: int | None = None  # prompts in total, selected by the seed; None: all
    anonymous: bool = False  # keep prompts of unknown users, each counted as a user
    seed: int = 0


@dataclass
class Candidates:
    """Prompts that have passed the filters of single rows, in the order of the file."""

    rows: int = 0  # read so far
    rejected: Counter[str] = field(default_factory=Counter)
    texts: dict[str, int] = field(default_factory=dict)  # each prompt once, and the number of its user
    users: dict[str, int] = field(default_factory=dict)
    features: Features = field(default_factory=Features)

    def user_numbers(self) -> NDArray[np.int64]:
        """Return (N,) the number of each prompt's user."""
        return np.fromiter(self.texts.values(), np.int64, len(self.texts))


class Selection(NamedTuple):
    """The prompts to write."""

    candidates: Candidates
    chosen: NDArray[np.int64]  # (M,) indices of candidates, in the order of the file to write
    cluster: NDArray[np.int64]  # (M,)
    complete: bool  # False if only part of the candidates for near-duplicates was compared

    def prompts(self) -> Iterator[Prompt]:
        """Yield the prompts to write; those that are alone in their cluster have none."""
        texts, users = list(self.candidates.texts), list(self.candidates.users)
        user_of = self.candidates.user_numbers()
        shared = np.bincount(self.cluster)[self.cluster] > 1
        rows = zip(self.chosen.tolist(), self.cluster.tolist(), shared.tolist(), strict=True)
        for index, cluster, is_shared in rows:
            yield Prompt(texts[index], users[user_of[index]] or None, str(cluster) if is_shared else None)


def prepare(
    source: Path, out: Path, filters: Filters, counter: TokenCounter | None, revision: str | None = None
) -> dict[str, Any]:
    """Write the prompts to `out`, and next to it its data card (.card.json and .card.md).

    Args:
        source: DiffusionDB's metadata.parquet.
        out: File to write, .jsonl. Every file is written atomically.
        filters: Limits for the prompts.
        counter: Counts tokens; None: prompts of any length are kept.
        revision: Commit of the source on the hub, for the card.

    Returns:
        The content of the .card.json.

    Raises:
        ConfigError: `source` is not such a file, or no prompt is left.
    """
    selection = select(read_candidates(source, filters, counter), filters)
    if not len(selection.chosen):
        rejected = selection.candidates.rejected.most_common()
        counts = ", ".join(f"{name}: {count}" for name, count in rejected if count)
        raise ConfigError(
            f"{source}: none of {selection.candidates.rows} rows is left ({counts or 'it is empty'}); "
            "relax a filter, or check the content of the file"
        )
    cards = out.with_suffix(".card.json"), out.with_suffix(".card.md")
    for path in cards:
        path.unlink(missing_ok=True)  # of an older file of this name
    digest = _write_prompts(out, selection)
    settings = asdict(filters) | {"tokenizer": counter and counter.name, "revision": revision}
    card = make_card(selection, out, digest, source, settings)
    for path, text in zip(cards, (json.dumps(card, indent=2) + "\n", card_markdown(card)), strict=True):
        write_atomically(path, text.encode())
    return card


# ------------------------------------------------------------------------------------------- reading


def read_candidates(source: Path, filters: Filters, counter: TokenCounter | None) -> Candidates:
    """Read the prompts that pass the filters of single rows, each prompt once."""
    candidates = Candidates()
    for prompt, user, nsfw in read_rows(source):
        candidates.rows += 1
        rejection = _add(candidates, prompt, user, nsfw, filters, counter)
        if rejection is not None:
            candidates.rejected[rejection] += 1
    return candidates


def _add(
    candidates: Candidates,
    prompt: str | None,
    user: str | None,
    nsfw: float | None,
    filters: Filters,
    counter: TokenCounter | None,
) -> str | None:
    """Add a row, or return the reason to leave it out."""
    if nsfw is None or not 0 <= nsfw <= 1:  # False for NaN
        return NO_SCORE
    if nsfw > filters.max_nsfw:
        return UNSAFE
    text = clean_text(prompt) if prompt else ""
    if not text:
        return NO_PROMPT
    if user is None or user in UNKNOWN_USERS:
        if not filters.anonymous:
            return NO_USER
        user = ""
    if text in candidates.texts:
        return DUPLICATE
    found = words(text)
    if len(found) < filters.min_words:
        return SHORT
    if counter is not None and counter.count(text) > filters.max_tokens:
        return LONG
    candidates.texts[text] = candidates.users.setdefault(user, len(candidates.users))
    candidates.features.add(found)
    return None


def clean_text(prompt: str) -> str:
    """Return a prompt of any language normalized, without HTML entities and control characters."""
    if not (prompt.isascii() and prompt.isprintable() and "&" not in prompt):
        prompt = ENTITY.sub(_unescape, prompt)
        prompt = "".join(" " if unicodedata.category(c) in INVISIBLE else c for c in prompt)
    return normalize_text(prompt)


def _unescape(entity: re.Match[str]) -> str:
    """Return the character of an entity; unknown ones stay (html.unescape would turn &notes; into ¬es;)."""
    named = not entity[0].startswith("&#")
    return html5.get(entity[0][1:], entity[0]) if named else html.unescape(entity[0])


def read_rows(source: Path) -> Iterator[tuple[str | None, str | None, float | None]]:
    """Yield prompt, user and prompt_nsfw of each row of a file of any size.

    Raises:
        ConfigError: The file is missing, damaged, or of another format.
    """
    import pyarrow as pa
    from pyarrow import parquet

    if source.is_dir():
        raise ConfigError(f"{source}: is a folder; name {METADATA} in it")
    try:
        with parquet.ParquetFile(source, memory_map=False, pre_buffer=False) as file:
            _check_schema(source, file.schema_arrow)
            for batch in file.iter_batches(BATCH, columns=list(COLUMNS), use_threads=False):
                yield from zip(*map(_values, map(batch.column, COLUMNS)), strict=True)
    except FileNotFoundError as error:
        raise ConfigError(f"{source}: no such file; name DiffusionDB's {METADATA} with --metadata") from error
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(
            f"{source}: not a complete Parquet file ({reason(error)}); download it again from {REPOSITORY}"
        ) from error


def _check_schema(source: Path, schema: Any) -> None:
    from pyarrow import types

    missing = [name for name in COLUMNS if name not in schema.names]
    if missing:
        raise ConfigError(
            f"{source}: no column {', '.join(missing)} (found {', '.join(schema.names)[:120]}); "
            f"use DiffusionDB's own {METADATA}"
        )
    repeated = next((name for name in COLUMNS if schema.names.count(name) > 1), None)
    if repeated is not None:
        raise ConfigError(f"{source}: several columns {repeated}; use DiffusionDB's own {METADATA}")
    for name in COLUMNS:
        kind = schema.field(name).type
        inner = kind.value_type if types.is_dictionary(kind) else kind
        number = name == "prompt_nsfw"
        if not (
            types.is_floating(inner) if number else types.is_string(inner) or types.is_large_string(inner)
        ):
            raise ConfigError(
                f"{source}: column {name} is of type {kind}, not {'floating point' if number else 'string'}; "
                f"use DiffusionDB's own {METADATA}"
            )


def _values(column: Any) -> list[Any]:
    """Return the values of a column; None for text that is not UTF-8."""
    import pyarrow as pa

    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        raw = column.cast(pa.large_string()).cast(pa.large_binary()).to_pylist()
        return [_decoded(value) for value in raw]


def _decoded(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None


# ----------------------------------------------------------------------------------------- selecting


def select(candidates: Candidates, filters: Filters) -> Selection:
    """Select the prompts to write, in an order that is random by the seed.

    Because the order is random, the first lines of the file are a sample too.
    """
    result = remove_near_duplicates(candidates.features, filters.near_duplicate)
    order = np.random.default_rng(filters.seed).permutation(np.flatnonzero(result.kept))
    candidates.rejected[NEAR] += int((~result.kept).sum())
    if filters.per_user is not None:
        users = candidates.user_numbers()[order]
        allowed = (_earlier_equals(users) < filters.per_user) | (users == candidates.users.get("", -1))
        candidates.rejected[PER_USER] += int((~allowed).sum())
        order = order[allowed]
    if filters.sample is not None:
        candidates.rejected[UNSAMPLED] += max(0, len(order) - filters.sample)
        order = order[: filters.sample]
    return Selection(candidates, order, result.cluster[order], result.complete)


def _earlier_equals(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return (N,) how many equal values precede each value."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.searchsorted(ordered, ordered)
    counts = np.empty_like(values)
    counts[order] = np.arange(len(values)) - starts
    return counts


# ------------------------------------------------------------------------------------------- writing


def _write_prompts(out: Path, selection: Selection) -> str:
    """Write one JSON object a line, and return the SHA-256 of the file."""
    digest = hashlib.sha256()

    def write(target: Path) -> None:
        with target.open("wb") as file:
            for prompt in selection.prompts():
                named = {name: value for name, value in asdict(prompt).items() if value is not None}
                line = (json.dumps({"prompt": named.pop("text")} | named, ensure_ascii=False) + "\n").encode()
                digest.update(line)
                file.write(line)

    write_atomically(out, write)
    return digest.hexdigest()


def make_card(
    selection: Selection, out: Path, digest: str, source: Path, settings: dict[str, Any]
) -> dict[str, Any]:
    """Return the data card: counts, source, settings and versions, to reproduce the file."""
    with source.open("rb") as file:
        source_digest = hashlib.file_digest(file, "sha256").hexdigest()
    candidates = selection.candidates
    return {
        "file": out.name,
        "sha256": digest,
        "prompts": len(selection.chosen),
        "users": len(set(candidates.user_numbers()[selection.chosen].tolist())),
        "clusters": int((np.bincount(selection.cluster) > 1).sum()),
        "licence": LICENCE,
        "source": {
            "dataset": REPOSITORY,
            "file": source.name,
            "sha256": source_digest,
            "rows": candidates.rows,
        },
        "settings": settings,
        "near-duplicates": ALL_COMPARED if selection.complete else PART_COMPARED,
        "left out": {name: candidates.rejected[name] for name in REJECTIONS},
        "versions": {name: version(name) for name in ("karlo-reward-lab", "numpy", "pyarrow", "rensa")},
    }


def card_markdown(card: dict[str, Any]) -> str:
    """Return the data card as Markdown."""

    def table(title: str, rows: dict[str, Any]) -> str:
        lines = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
        return f"## {title}\n\n| | |\n|---|---|\n{lines}\n"

    named = ("file", "sha256", "prompts", "users", "clusters", "near-duplicates", "licence")
    head = {name: card[name] for name in named}
    return "\n".join(
        [
            f"# {card['prompts']} prompts of DiffusionDB\n",
            "Written by `reward-trainer prompts diffusiondb`. Prompts of a cluster share a near-duplicate.\n",
            table("File", head),
            table("Source", card["source"]),
            table("Rows left out, by the first filter that rejected them", card["left out"]),
            table("Settings", card["settings"]),
            table("Versions", card["versions"]),
        ]
    )
