"""Bearer keys: who a caller is. The file holds hashes, never a key. No torch, no web.

The file is a YAML list with an entry for each key::

    - name: trainer           # whom requests are counted and scheduled for
      sha256: 9f86d0…         # of the key
      weight: 2.0             # share of the device beside other clients; 1 if it is left out
      max_pairs: 512          # under way at a time; limits.max_client_pairs if it is left out
      may: [score, metrics]   # both if it is left out

Two entries of one name are two keys of one client, so that a key can be changed without a pause.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, PositiveInt, StringConstraints, TypeAdapter, ValidationError

from reward_service.config import Sha256
from reward_service.settings import ConfigError, Settings, one_line

ClientName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
Permission = Literal["score", "metrics"]

_PREFIX = "rk_"
_SECRET_BYTES = 32


class Key(Settings):
    """One entry of the file."""

    name: ClientName
    sha256: Sha256
    weight: Annotated[float, Field(ge=0.001, le=1000)] = 1.0
    max_pairs: PositiveInt | None = None
    may: frozenset[Permission] = frozenset({"score", "metrics"})


@dataclass(frozen=True)
class Client:
    """Who asks.

    :param name: of the key; "" without one
    :param part: what ``X-Client-Id`` says: a part of the key's work, or who it is if there is no key
    :param weight: share of the device, that of all parts of a key together
    :param max_pairs: most pairs under way at a time; None for the service's limit
    """

    name: str = ""
    part: str = ""
    weight: float = 1.0
    max_pairs: int | None = None
    may: frozenset[str] = frozenset({"score", "metrics"})

    @property
    def account(self) -> str:
        """What quotas are counted for: the key with all its parts, or the part where there is no key."""
        return f"key {self.name}" if self.name else f"anonymous {self.part}"

    @property
    def queue(self) -> str:
        """What the scheduler tells apart."""
        return f"{self.account} {self.part}" if self.name else self.account


class Keyring:
    """The keys of a file, read anew on :meth:`reload`.

    :raises ConfigError: the file cannot be used
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._keys = load_keys(path)

    def client(self, key: str, part: str = "") -> Client | None:
        """Whose key it is; None if nobody's. Takes as long whatever was presented."""
        digest = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()
        found = None
        for entry in self._keys:
            if hmac.compare_digest(entry.sha256, digest):
                found = entry
        if found is None:
            return None
        return Client(found.name, part, found.weight, found.max_pairs, found.may)

    def reload(self, note: Callable[[str], None]) -> None:
        """Read the file again; the keys stay as they are if it cannot be used.

        :param note: told in one line what became of it
        """
        try:
            self._keys = load_keys(self._path)
        except ConfigError as error:
            note(f"the keys stay as they were: {error}")
        else:
            note(f"keys: {len(self._keys)} read from {self._path}")


def load_keys(path: Path) -> tuple[Key, ...]:
    """Read a file of keys.

    :raises ConfigError: it is missing, malformed, empty, or others than its owner may write to it
    """
    entries = _entries(path)
    if not entries:
        raise ConfigError(f"{path}: it holds no keys; make one with reward-service keys new NAME")
    return entries


def _entries(path: Path) -> tuple[Key, ...]:
    try:
        with path.open(encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            entries = _parsed(file.read())
    except OSError as error:
        remedy = "make one with reward-service keys new NAME"
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(f"{path}: {where}: {one_line(first['msg'])}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a YAML list of keys ({type(error).__name__}); correct it") from None
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"{path}: others may write to it, and so let themselves in; chmod go-w")
    if len({entry.sha256 for entry in entries}) < len(entries):
        raise ConfigError(f"{path}: one key is there twice; remove an entry")
    return tuple(entries)


def _parsed(text: str) -> list[Key]:
    found = yaml.safe_load(text)
    return TypeAdapter(list[Key]).validate_python([] if found is None else found)


def new_key(path: Path, name: str, weight: float = 1.0) -> tuple[str, int]:
    """Make a key and append its hash to a file, which is made if it is not there.

    :returns: the key, which is nowhere else, and how many keys of this name there are now
    :raises ConfigError: the name, the weight or the file cannot be used
    """
    key = _PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
    try:
        entry = Key(name=name, sha256=hashlib.sha256(key.encode()).hexdigest(), weight=weight)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(f"{first['loc'][0]}: {one_line(first['msg'])}") from None
    before = _entries(path) if path.exists() else ()
    lines = f"- name: {entry.name!r}\n  sha256: {entry.sha256!r}\n  weight: {entry.weight!r}\n"
    _check_appendable(path, lines, [*before, entry])
    try:
        # Its owner alone may read and write it, from the first moment.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
        with path.open("a", encoding="utf-8") as file:
            file.write(_line_end(path) + lines)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None
    return key, 1 + sum(entry.name == name for entry in before)


def _check_appendable(path: Path, lines: str, expected: list[Key]) -> None:
    """A list that is indented or in brackets is valid, but not with an entry behind it."""
    text = path.read_text(encoding="utf-8") + _line_end(path) if path.exists() else ""
    try:
        fits = _parsed(text + lines) == expected
    except (yaml.YAMLError, ValueError):
        fits = False
    if not fits:
        remedy = "begin each entry with `- ` at the start of a line"
        raise ConfigError(f"{path}: nothing can be appended to a list of this form; {remedy}")


def _line_end(path: Path) -> str:
    """What an editor may have left out at the file's end."""
    text = path.read_bytes()
    return "\n" if text and not text.endswith(b"\n") else ""
