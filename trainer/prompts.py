"""Prompt sets: text files with one prompt a line."""

import unicodedata
from collections.abc import Iterable
from pathlib import Path

from trainer.config import ConfigError, PromptsConfig


def read_prompts(path: Path, limit: int | None = None) -> tuple[str, ...]:
    """The distinct prompts of a UTF-8 text file, in order, without blank lines and lines that begin with #.

    Raises ConfigError, in one line, for a file that is not there, is not text or holds no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such prompt file; see trainer.prompts in the configuration") from error
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    prompts = clean(line for line in lines if not line.lstrip().startswith("#"))
    if not prompts:
        raise ConfigError(f"{path}: holds no prompt; write one a line")
    return prompts[:limit]


def clean(prompts: Iterable[str]) -> tuple[str, ...]:
    """Prompts in NFC with single spaces; empty ones and repetitions left out, order kept."""
    spaced = (" ".join(unicodedata.normalize("NFC", prompt).split()) for prompt in prompts)
    return tuple(dict.fromkeys(prompt for prompt in spaced if prompt))


def read_splits(config: PromptsConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Train and validation prompts. Raises ConfigError where one is on both sides: a leak."""
    train = read_prompts(config.train, config.train_limit)
    if config.validation is None:
        raise ConfigError("trainer.prompts.validation: name a file of prompts to evaluate on")
    validation = read_prompts(config.validation, config.validation_limit)
    shared = sorted(set(map(str.casefold, train)) & set(map(str.casefold, validation)))
    if shared:
        raise ConfigError(
            f"{config.validation}: {len(shared)} prompts are also training prompts, the first {shared[0]!r}; "
            "remove them from one of the two files"
        )
    return train, validation
