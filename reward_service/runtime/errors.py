"""Error of a configuration, an input file or an environment that cannot be used."""

from __future__ import annotations


class ConfigError(Exception):
    """A configuration that cannot be used; the message is one line."""


def one_line(message: object) -> str:
    """Return the message on one line, with single spaces."""
    return " ".join(str(message).split())
