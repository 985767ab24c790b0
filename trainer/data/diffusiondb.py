"""Prompts out of DiffusionDB's metadata.parquet (2 M rows), ready to be split: filtered, distinct, grouped.

One pass over three columns keeps what the filters let through; then near-duplicates go; then a sample is
drawn. docs/prompts.md says what each filter is for. DiffusionDB (Wang et al. 2022) is CC0 1.0.
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
from trainer.data.near_duplicates import Features, distinct, words
from trainer.data.prompts import Prompt, cleaned
from trainer.data.tokenizer import TokenCounter
from trainer.runtime.errors import reason
from trainer.runtime.files import write_atomically

REPOSITORY, METADATA = "poloclub/diffusiondb", "metadata.parquet"
COLUMNS = ("prompt", "user_name", "prompt_nsfw")
LICENCE = "CC0 1.0 (https://creativecommons.org/publicdomain/zero/1.0/)"
NOBODY = ("", "deleted_account")  # what DiffusionDB calls users whose account is gone
BATCH = 20_000  # rows read at once

# Why a row is left out, in the order in which it is asked.
REFUSALS = (
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
INVISIBLE = ("Cc", "Cs")  # categories of control characters and half characters; white space is no concern


@dataclass(frozen=True)
class Filters:
    """What is taken."""

    max_nsfw: float = 0.5  # prompt_nsfw, from 0 to 1
    min_words: int = 3  # of any script: see trainer.data.near_duplicates
    max_tokens: int = 77  # of Karlo's tokenizer, start and end included
    near_duplicate: float = 0.77  # similarity from which on the later of two prompts goes
    per_user: int | None = None  # prompts of one user, drawn by the seed
    sample: int | None = None  # prompts in all, drawn by the seed
    anonymous: bool = False  # take prompts of unknown users, each a user of its own
    seed: int = 0


@dataclass
class Harvest:
    """What single prompts' filters let through, in the file's order."""

    rows: int = 0  # read
    refused: Counter[str] = field(default_factory=Counter)
    texts: dict[str, int] = field(default_factory=dict)  # each prompt once, and the number of its user
    users: dict[str, int] = field(default_factory=dict)
    features: Features = field(default_factory=Features)

    def owners(self) -> NDArray[np.int64]:
        """(N,) number of each prompt's user."""
        return np.fromiter(self.texts.values(), np.int64, len(self.texts))


ALL_COMPARED = "all candidates were compared"
PART_COMPARED = (
    "so many prompts share their phrases that only part of the candidates were compared: some may be left"
)


class Taken(NamedTuple):
    """What is written."""

    harvest: Harvest
    chosen: NDArray[np.int64]  # (M,) places in the harvest
    cluster: NDArray[np.int64]  # (M,)
    complete: bool  # whether all candidates for near-duplicates were compared

    def prompts(self) -> Iterator[Prompt]:
        """In the order in which they are written; the cluster is told where it holds several of them."""
        texts, users, owner = list(self.harvest.texts), list(self.harvest.users), self.harvest.owners()
        shared = np.bincount(self.cluster)[self.cluster] > 1
        for place, label, told in zip(
            self.chosen.tolist(), self.cluster.tolist(), shared.tolist(), strict=True
        ):
            yield Prompt(texts[place], users[owner[place]] or None, str(label) if told else None)


def prepare(
    source: Path, out: Path, filters: Filters, counter: TokenCounter | None, revision: str | None = None
) -> dict[str, Any]:
    """Write `out` (.jsonl) and beside it its card (.card.json and .card.md); returns the card.

    Each file is whole or not there. Raises ConfigError where `source` is no such file, or nothing is left.
    """
    taken = choose(gather(source, filters, counter), filters)
    if not len(taken.chosen):
        counts = ", ".join(f"{name}: {count}" for name, count in taken.harvest.refused.most_common() if count)
        raise ConfigError(
            f"{source}: none of {taken.harvest.rows} rows is left ({counts or 'it is empty'}); "
            "widen a filter, or see what the file holds"
        )
    cards = out.with_suffix(".card.json"), out.with_suffix(".card.md")
    for path in cards:
        path.unlink(missing_ok=True)  # of an older file of this name
    digest = _write_prompts(out, taken)
    settings = asdict(filters) | {"tokenizer": counter and counter.name, "revision": revision}
    card = card_of(taken, out, digest, source, settings)
    for path, text in zip(cards, (json.dumps(card, indent=2) + "\n", markdown(card)), strict=True):
        write_atomically(path, text.encode())
    return card


# ------------------------------------------------------------------------------------------- reading


def gather(source: Path, filters: Filters, counter: TokenCounter | None) -> Harvest:
    """Read the rows that the filters of single prompts let through, each prompt once."""
    harvest = Harvest()
    for prompt, user, nsfw in read_rows(source):
        harvest.rows += 1
        refusal = _take(harvest, prompt, user, nsfw, filters, counter)
        if refusal is not None:
            harvest.refused[refusal] += 1
    return harvest


def _take(
    harvest: Harvest,
    prompt: str | None,
    user: str | None,
    nsfw: float | None,
    filters: Filters,
    counter: TokenCounter | None,
) -> str | None:
    """Add a row, or say which filter refuses it."""
    if nsfw is None or not 0 <= nsfw <= 1:  # false for what is no number
        return NO_SCORE
    if nsfw > filters.max_nsfw:
        return UNSAFE
    text = tidied(prompt) if prompt else ""
    if not text:
        return NO_PROMPT
    if user is None or user in NOBODY:
        if not filters.anonymous:
            return NO_USER
        user = ""
    if text in harvest.texts:
        return DUPLICATE
    found = words(text)
    if len(found) < filters.min_words:
        return SHORT
    if counter is not None and counter.count(text) > filters.max_tokens:
        return LONG
    harvest.texts[text] = harvest.users.setdefault(user, len(harvest.users))
    harvest.features.add(found)
    return None


def tidied(prompt: str) -> str:
    """In NFC with single spaces, without HTML entities and control characters, whatever the language."""
    if not (prompt.isascii() and prompt.isprintable() and "&" not in prompt):
        prompt = ENTITY.sub(_meant, prompt)
        prompt = "".join(" " if unicodedata.category(c) in INVISIBLE else c for c in prompt)
    return cleaned(prompt)


def _meant(entity: re.Match[str]) -> str:
    """A character for its entity; what is none stays (html.unescape would take &notes; for ¬es;)."""
    named = not entity[0].startswith("&#")
    return html5.get(entity[0][1:], entity[0]) if named else html.unescape(entity[0])


def read_rows(source: Path) -> Iterator[tuple[str | None, str | None, float | None]]:
    """Prompt, user and prompt_nsfw of each row, from a file of any size. Raises ConfigError."""
    import pyarrow as pa
    from pyarrow import parquet

    if source.is_dir():
        raise ConfigError(f"{source}: is a folder; name the {METADATA} in it")
    try:
        with parquet.ParquetFile(source, memory_map=False, pre_buffer=False) as file:
            _check_schema(source, file.schema_arrow)
            for batch in file.iter_batches(BATCH, columns=list(COLUMNS), use_threads=False):
                yield from zip(*map(_values, map(batch.column, COLUMNS)), strict=True)
    except FileNotFoundError as error:
        raise ConfigError(f"{source}: no such file; name DiffusionDB's {METADATA} with --metadata") from error
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(
            f"{source}: no whole Parquet file ({reason(error)}); fetch it again from {REPOSITORY}"
        ) from error


def _check_schema(source: Path, schema: Any) -> None:
    from pyarrow import types

    missing = [name for name in COLUMNS if name not in schema.names]
    if missing:
        raise ConfigError(
            f"{source}: no column {', '.join(missing)} (there are {', '.join(schema.names)[:120]}); "
            f"give DiffusionDB's own {METADATA}"
        )
    twice = next((name for name in COLUMNS if schema.names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{source}: several columns {twice}; give DiffusionDB's own {METADATA}")
    for name in COLUMNS:
        kind = schema.field(name).type
        inner = kind.value_type if types.is_dictionary(kind) else kind
        number = name == "prompt_nsfw"
        if not (
            types.is_floating(inner) if number else types.is_string(inner) or types.is_large_string(inner)
        ):
            raise ConfigError(
                f"{source}: column {name} is of type {kind}, not {'floating point' if number else 'string'}; "
                f"give DiffusionDB's own {METADATA}"
            )


def _values(column: Any) -> list[Any]:
    """Of a column; None for text that is not UTF-8."""
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


# ------------------------------------------------------------------------------------------ choosing


def choose(harvest: Harvest, filters: Filters) -> Taken:
    """What is taken of the gathered prompts, in an order drawn by the seed.

    The order is that of chance, so that the first so many are a sample too.
    """
    found = distinct(harvest.features, filters.near_duplicate)
    order = np.random.default_rng(filters.seed).permutation(np.flatnonzero(found.kept))
    harvest.refused[NEAR] += int((~found.kept).sum())
    if filters.per_user is not None:
        users = harvest.owners()[order]
        few = (_repeats(users) < filters.per_user) | (users == harvest.users.get("", -1))
        harvest.refused[PER_USER] += int((~few).sum())
        order = order[few]
    if filters.sample is not None:
        harvest.refused[UNSAMPLED] += max(0, len(order) - filters.sample)
        order = order[: filters.sample]
    return Taken(harvest, order, found.cluster[order], found.complete)


def _repeats(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each value came before."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.searchsorted(ordered, ordered)
    found = np.empty_like(values)
    found[order] = np.arange(len(values)) - starts
    return found


# ------------------------------------------------------------------------------------------- writing


def _write_prompts(out: Path, taken: Taken) -> str:
    """Write a JSON object on each line; returns the file's SHA-256."""
    digest = hashlib.sha256()

    def write(target: Path) -> None:
        with target.open("wb") as file:
            for prompt in taken.prompts():
                named = {name: value for name, value in asdict(prompt).items() if value is not None}
                line = (json.dumps({"prompt": named.pop("text")} | named, ensure_ascii=False) + "\n").encode()
                digest.update(line)
                file.write(line)

    write_atomically(out, write)
    return digest.hexdigest()


def card_of(taken: Taken, out: Path, digest: str, source: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What was done, so that it can be done again."""
    with source.open("rb") as file:
        read = hashlib.file_digest(file, "sha256").hexdigest()
    harvest = taken.harvest
    return {
        "file": out.name,
        "sha256": digest,
        "prompts": len(taken.chosen),
        "users": len(set(harvest.owners()[taken.chosen].tolist())),
        "clusters": int((np.bincount(taken.cluster) > 1).sum()),
        "licence": LICENCE,
        "source": {"dataset": REPOSITORY, "file": source.name, "sha256": read, "rows": harvest.rows},
        "settings": settings,
        "near-duplicates": ALL_COMPARED if taken.complete else PART_COMPARED,
        "left out": {name: harvest.refused[name] for name in REFUSALS},
        "versions": {name: version(name) for name in ("karlo-reward-lab", "numpy", "pyarrow", "rensa")},
    }


def markdown(card: dict[str, Any]) -> str:
    """The card for people."""

    def table(title: str, rows: dict[str, Any]) -> str:
        lines = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
        return f"## {title}\n\n| | |\n|---|---|\n{lines}\n"

    named = ("file", "sha256", "prompts", "users", "clusters", "near-duplicates", "licence")
    head = {name: card[name] for name in named}
    return "\n".join(
        [
            f"# {card['prompts']} prompts of DiffusionDB\n",
            "Made by `reward-trainer prompts diffusiondb`. Prompts of a cluster share a near-duplicate.\n",
            table("File", head),
            table("Source", card["source"]),
            table("Rows left out, by the first filter that refused them", card["left out"]),
            table("Settings", card["settings"]),
            table("Versions", card["versions"]),
        ]
    )
