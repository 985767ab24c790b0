"""Time and memory of preparing DiffusionDB's prompts, on a file of its size and schema.

    python -m benchmarks.diffusiondb [--rows 2000000] [--out benchmarks/results]

The file is synthetic: users who vary an idea, word frequencies of a natural language (Zipf's law), common
endings, repeated prompts, a few malformed rows.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet

from benchmarks.common.results import Report, Rows, machine

SCHEMA = pa.schema(
    [
        ("image_name", pa.string()),
        ("prompt", pa.string()),
        ("part_id", pa.uint16()),
        ("seed", pa.uint32()),
        ("step", pa.uint16()),
        ("cfg", pa.float32()),
        ("sampler", pa.uint8()),
        ("width", pa.uint16()),
        ("height", pa.uint16()),
        ("user_name", pa.string()),
        ("timestamp", pa.timestamp("us", tz="UTC")),
        ("image_nsfw", pa.float32()),
        ("prompt_nsfw", pa.float32()),
    ]
)
ENDINGS = (
    "trending on artstation, highly detailed, digital painting, sharp focus",
    "octane render, 8 k, cinematic lighting, unreal engine",
    "oil on canvas, intricate, elegant, smooth, concept art",
    "photograph, 3 5 mm, depth of field, natural light",
    "studio ghibli style, soft colours, matte painting",
)
VOCABULARY = 60_000
GROUP = 50_000  # rows in a row group


@dataclass
class Preparation(Report):
    """Measured preparation of prompts."""

    name = "diffusiondb"
    titles = {  # noqa: RUF012
        "machine": "## Machine\n",
        "prepared": "\n## `reward-trainer prompts diffusiondb`\n",
        "left_out": "\n## Rows left out\n",
    }
    prepared: Rows
    left_out: Rows


def write_metadata(path: Path, rows: int, users: int = 10_000, seed: int = 0) -> None:
    """Write a file of DiffusionDB's schema."""
    rng = np.random.default_rng(seed)
    names = [f"{user:064x}" for user in rng.integers(2**62, size=users)] + ["deleted_account", None]
    with parquet.ParquetWriter(path, SCHEMA, compression="snappy") as writer:
        prompts = _prompts(rng, users)
        for start in range(0, rows, GROUP):
            n = min(GROUP, rows - start)
            texts, owners = zip(*(next(prompts) for _ in range(n)), strict=True)
            writer.write_table(_table(rng, start, list(texts), [names[owner] for owner in owners]))


def _table(rng: np.random.Generator, start: int, prompts: list[str], users: list[str | None]) -> pa.Table:
    n = len(prompts)
    nsfw = rng.beta(0.2, 6, n).astype(np.float32)
    nsfw[rng.random(n) < 1e-4] = np.nan
    columns = {
        "image_name": [f"{start + i:036x}.png" for i in range(n)],
        "prompt": [None if i % 9973 == 0 else prompt for i, prompt in enumerate(prompts)],
        "part_id": (start + np.arange(n)) // 1000 % 2**16,
        "seed": rng.integers(2**32, size=n),
        "step": rng.integers(10, 150, n),
        "cfg": rng.choice([7.0, 7.5, 10.0, 15.0], n),
        "sampler": rng.integers(1, 9, n),
        "width": rng.choice([512, 640, 768], n),
        "height": rng.choice([512, 640, 768], n),
        "user_name": users,
        "timestamp": 1_659_900_000_000_000 + 400_000 * (start + np.arange(n)),
        "image_nsfw": np.where(rng.random(n) < 0.02, 2.0, rng.beta(0.2, 6, n)),
        "prompt_nsfw": nsfw,
    }
    return pa.table([pa.array(columns[f.name], type=f.type) for f in SCHEMA], schema=SCHEMA)


def _prompts(rng: np.random.Generator, users: int) -> Iterator[tuple[str, int]]:
    """Yield prompts and users endlessly: sessions of one user who varies an idea."""
    words = np.array([_word(n) for n in range(VOCABULARY)], dtype=object)
    frequency = 1 / (np.arange(VOCABULARY) + 10)
    share = 1 / (np.arange(users) + 20)  # a few users have most of the prompts
    while True:  # sample in bulk: one word at a time would take minutes
        pool = words[rng.choice(VOCABULARY, 400_000, p=frequency / frequency.sum())]
        owners = rng.choice(users, 5_000, p=share / share.sum())
        place = 0
        for owner in owners:
            length, tries = int(rng.integers(4, 26)), int(rng.geometric(0.15))
            if place + length + 2 * tries >= len(pool):
                break
            idea, place = pool[place : place + length], place + length
            ending = ENDINGS[rng.integers(len(ENDINGS))]
            anonymous = rng.random() < 0.02
            for _ in range(tries):
                text = " ".join(idea) + (", " + ending if length < 22 else "")
                yield _decorated(text, rng), users + int(rng.integers(2)) if anonymous else int(owner)
                kind = rng.random()
                if kind < 0.55:  # another word; below 0.75 the ending; else the same prompt again
                    idea = idea.copy()
                    idea[rng.integers(length)], place = pool[place], place + 1
                elif kind < 0.75:
                    ending = ENDINGS[rng.integers(len(ENDINGS))]


def _word(n: int) -> str:
    """Return a pronounceable word for a number."""
    letters = ""
    while n or not letters:
        n, vowel = divmod(n, 5)
        n, consonant = divmod(n, 14)
        letters += "bdfgklmnprstvz"[consonant] + "aeiou"[vowel]
    return letters


def _decorated(text: str, rng: np.random.Generator) -> str:
    chance = rng.random()
    if chance < 0.02:
        return text.replace("a", "á", 2) + " &amp; más"
    if chance < 0.03:
        return "美しい山と湖の絵、夕暮れ " + text
    return text.capitalize() if chance < 0.2 else text


def measure(metadata: Path, out: Path, options: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the command in a subprocess; return the row of the report and the prompts' card."""
    command = [sys.executable, "-m", "trainer", "prompts", "diffusiondb", "--metadata", str(metadata)]
    began, used = time.perf_counter(), _cpu_seconds()
    subprocess.run([*command, "--out", str(out), *options], check=True)
    card = json.loads(out.with_suffix(".card.json").read_text())
    return {
        "rows": card["source"]["rows"],
        "file": f"{metadata.stat().st_size / 1e6:.0f} MB",
        "seconds": round(time.perf_counter() - began, 1),
        "CPU seconds": round(_cpu_seconds() - used, 1),
        "peak memory": f"{resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6:.2f} GB",
        "prompts": card["prompts"],
        "users": card["users"],
    }, card


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Write the file, prepare the prompts, report time and memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000, help="rows of the synthetic file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--metadata", type=Path, help="existing metadata file, instead of a synthetic one")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    command = " ".join(["python -m benchmarks.diffusiondb", *sys.argv[1:]])
    about = machine(torch.device("cpu"), torch.float32, None, command)
    with tempfile.TemporaryDirectory() as folder:
        metadata = arguments.metadata or Path(folder) / "metadata.parquet"
        if arguments.metadata is None:
            write_metadata(metadata, arguments.rows, seed=arguments.seed)
        prepared, card = measure(metadata, Path(folder) / "prompts.jsonl", [])
    left_out = [{"": name, "rows": count} for name, count in card["left out"].items()]
    report = Preparation(about, [prepared], left_out)
    report.write(arguments.out)
    print(report.markdown())


if __name__ == "__main__":
    main()
