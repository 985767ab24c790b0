"""Commands `prompts …`: prepare prompt sets from public collections."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from reward_service.runtime.console import open_console
from trainer.config import ConfigError, load_trainer_config
from trainer.data.diffusiondb import ALL_COMPARED, METADATA, REPOSITORY, Filters, prepare
from trainer.data.tokenizer import TokenCounter, fetch

prompts_app = typer.Typer(help="Prepare prompt sets.", no_args_is_help=True, rich_markup_mode=None)


@prompts_app.callback()
def prompts() -> None:
    """Prepare prompt sets."""


@prompts_app.command()
def diffusiondb(
    out: Annotated[Path, typer.Option("--out", help="File to write, .jsonl; its card is written beside it.")],
    metadata: Annotated[
        Path | None, typer.Option("--metadata", help=f"{METADATA}; by default the hub's is fetched.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help=f"Of {REPOSITORY} on the hub.  [default: main]")
    ] = None,
    sample: Annotated[int | None, typer.Option("--sample", min=1, help="Number of prompts to take.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of order and sample.")] = 0,
    per_user: Annotated[
        int | None, typer.Option("--per-user", min=1, help="Most prompts of one user.")
    ] = None,
    max_nsfw: Annotated[
        float, typer.Option("--max-nsfw", min=0, max=1, help="Largest prompt_nsfw.")
    ] = Filters.max_nsfw,
    min_words: Annotated[
        int, typer.Option("--min-words", min=1, help="Fewest words of a prompt.")
    ] = Filters.min_words,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=3, help="Most tokens, start and end included.")
    ] = Filters.max_tokens,
    near_duplicate: Annotated[
        float,
        typer.Option(
            "--near-duplicate", min=0.05, max=1, help="Similarity from which the later prompt is dropped."
        ),
    ] = Filters.near_duplicate,
    anonymous: Annotated[bool, typer.Option("--anonymous", help="Keep prompts of unknown users.")] = False,
    tokenizer: Annotated[
        Path | None,
        typer.Option("--tokenizer", help="Folder of Karlo's tokenizer.  [default: open_clip's copy]"),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="Take the tokenizer of the Karlo configured here.")
    ] = None,
) -> None:
    """Write filtered, distinct prompts of DiffusionDB with users and clusters, and a card."""
    _check_out(out)
    if metadata is not None and revision is not None:
        raise ConfigError("--revision: belongs to the hub's file; leave out --metadata or --revision")
    counter = _counter(tokenizer, config)
    source, commit = metadata, None
    if source is None:
        source, commit = fetch(
            REPOSITORY, METADATA, revision, "dataset", "download it elsewhere and name it with --metadata"
        )
    filters = Filters(
        max_nsfw=max_nsfw,
        min_words=min_words,
        max_tokens=max_tokens,
        near_duplicate=near_duplicate,
        per_user=per_user,
        sample=sample,
        anonymous=anonymous,
        seed=seed,
    )
    card = prepare(source, out, filters, counter, commit)
    _show(card["left out"], open_console())
    print(f"{card['prompts']} prompts of {card['users']} users: {out}, {out.with_suffix('.card.md')}")
    if card["near-duplicates"] != ALL_COMPARED:
        print(f"Near-duplicates: {card['near-duplicates']}.")
    if counter is None:
        print("Lengths in tokens were not checked: name a tokenizer with --tokenizer or --config.")


def _check_out(out: Path) -> None:
    if out.suffix.lower() != ".jsonl" or out.is_dir():
        raise ConfigError(f"{out}: the output is JSON lines; name a file that ends in .jsonl with --out")
    folder = out.resolve().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(
            f"{out}: its folder does not exist or cannot be written to; create it or name another"
        )


def _counter(tokenizer: Path | None, config: Path | None) -> TokenCounter | None:
    if tokenizer is not None and config is not None:
        raise ConfigError("--tokenizer and --config: give one of the two")
    if tokenizer is not None:
        return TokenCounter.read(tokenizer)
    if config is not None:
        return TokenCounter.of_karlo(load_trainer_config(config).karlo)
    return TokenCounter.of_open_clip()


def _show(left_out: dict[str, int], console: Console) -> None:
    table = Table("rows left out", "", title=None)
    for name, count in left_out.items():
        if count:
            table.add_row(name, f"{count:,}")
    console.print(table)
