"""API keys: authentication of clients, and the keys file, which holds hashes and never a key.

The file is a YAML list with one entry per key:

    - name: trainer           # the client; requests are counted and scheduled by it
      sha256: 9f86d0…         # of the key
      weight: 2.0             # share of the device relative to other clients; default 1
      max_pairs: 512          # most pairs in progress; default limits.max_client_pairs
      may: [score, metrics]   # permissions; default both

Two entries with the same name are two keys of one client, so that a key can be rotated without downtime.
This module imports neither torch nor a web framework.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, StringConstraints, TypeAdapter, ValidationError

from reward_service.config import Sha256
from reward_service.files import folder_lock, write_atomically
from reward_service.runtime.yaml12 import DuplicateKeyError, YamlError, parse_yaml
from reward_service.settings import ConfigError, Settings, one_line

ClientName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
Permission = Literal["score", "metrics"]
_ALL_PERMISSIONS: tuple[Permission, ...] = ("score", "metrics")

_KEY_PREFIX = "rk_"
_SECRET_BYTES = 32
_CHECK_INTERVAL_S = 1.0

# A list entry that starts in the first column, up to its last indented line: comments behind it belong to
# the next entry.
_ENTRY = re.compile(r"^- .*\n(?:(?:[ ]*(?:#.*)?\n)*[ ]+[^\s#].*\n)*", re.MULTILINE)


class Key(Settings):
    """One entry of the keys file."""

    name: ClientName
    sha256: Sha256
    weight: Annotated[float, Field(ge=0.001, le=1000)] = 1.0
    max_pairs: PositiveInt | None = None
    may: frozenset[Permission] = frozenset(_ALL_PERMISSIONS)


@dataclass(frozen=True)
class Client:
    """Sender of a request.

    Args:
        name: name of the key; "" without one
        part: value of `X-Client-Id`: one part of the key's work or, without a key, the client itself
        weight: share of the device, for all parts of a key together
        max_pairs: most pairs in progress at a time; None for the service's limit
        permissions: operations that the key allows
    """

    name: str = ""
    part: str = ""
    weight: float = 1.0
    max_pairs: int | None = None
    permissions: frozenset[str] = frozenset(_ALL_PERMISSIONS)

    @property
    def account(self) -> str:
        """Unit of the quotas: the key with all its parts, or the part if there is no key."""
        return f"key {self.name}" if self.name else f"anonymous {self.part}"

    @property
    def queue(self) -> str:
        """Unit of fair scheduling: one part of a key's work."""
        return f"{self.account} {self.part}" if self.name else self.account


class Keyring:
    """Keys of a file, reloaded when the file changes.

    A new key is valid at once; a removed key stays valid for one more second at most.

    Args:
        path: the keys file
        on_reload: called with one line after every attempt to reload the file

    Raises:
        ConfigError: the file cannot be used
    """

    def __init__(self, path: Path, on_reload: Callable[[str], None] = lambda _: None) -> None:
        self._path, self._on_reload = path, on_reload
        self._file_state, self._next_check_s = _file_state(path), time.monotonic() + _CHECK_INTERVAL_S
        self._keys = load_keys(path)

    def authenticate(self, key: str, part: str = "") -> Client | None:
        """Return the client that a key belongs to, or None if the key is unknown.

        The comparison with the known keys takes the same time for every presented key.
        """
        if time.monotonic() >= self._next_check_s:
            self._reload_if_changed()
        digest = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()
        found = self._find(digest)
        if found is None and self._reload_if_changed():
            found = self._find(digest)
        if found is None:
            return None
        return Client(found.name, part, found.weight, found.max_pairs, found.may)

    def reload(self) -> None:
        """Read the file again; keep the current keys if it cannot be used."""
        self._file_state = _file_state(self._path)
        try:
            self._keys = load_keys(self._path)
        except ConfigError as error:
            self._on_reload(f"keeping the current keys: {error}")
        else:
            self._on_reload(f"keys: {len(self._keys)} read from {self._path}")

    def _find(self, digest: str) -> Key | None:
        found = None
        for entry in self._keys:
            if hmac.compare_digest(entry.sha256, digest):
                found = entry  # no early exit: the time must not depend on the position
        return found

    def _reload_if_changed(self) -> bool:
        self._next_check_s = time.monotonic() + _CHECK_INTERVAL_S
        changed = _file_state(self._path) != self._file_state
        if changed:
            self.reload()
        return changed


def _file_state(path: Path) -> tuple[int, ...] | None:
    """Return the attributes that differ once a file is changed or replaced; None if it is missing."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size, found.st_mode


# Reading the file -------------------------------------------------------------------------------------


def load_keys(path: Path) -> tuple[Key, ...]:
    """Read a keys file.

    Raises:
        ConfigError: it is missing, malformed, empty, or writable by other users than its owner
    """
    entries = _read_entries(path)
    if not entries:
        raise ConfigError(f"{path}: no keys in the file; create one with reward-service keys new NAME")
    return entries


def _read_entries(path: Path) -> tuple[Key, ...]:
    try:
        with path.open(encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            entries = _parse(file.read())
    except OSError as error:
        remedy = "create one with reward-service keys new NAME"
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        location = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(f"{path}: {location}: {one_line(first['msg'])}") from None
    except YamlError as error:
        # Syntax errors quote the text, which may be a key in place of its hash.
        where = str(error) if isinstance(error, DuplicateKeyError) else f"line {error.line or 1}"
        raise ConfigError(f"{path}: not a YAML list of keys ({where}); correct it") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a YAML list of keys (not UTF-8 text); correct it") from None
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"{path}: writable by other users, who could add their own keys; chmod go-w")
    if len({entry.sha256 for entry in entries}) < len(entries):
        raise ConfigError(f"{path}: two entries have the same sha256; remove one")
    return tuple(entries)


def _parse(text: str) -> list[Key]:
    document = parse_yaml(text)
    return TypeAdapter(list[Key]).validate_python([] if document is None else document)


# Changing the file ------------------------------------------------------------------------------------
# Entries are added and removed as text, which keeps comments and layout; the result is parsed and compared
# with the expected keys before it replaces the file.


def new_key(
    path: Path, name: str, weight: float = 1.0, may: Sequence[Permission] | None = None
) -> tuple[str, int]:
    """Create a key and append its hash to the keys file, which is created if it is missing.

    Args:
        path: the keys file
        name: name of the client
        weight: share of the device relative to other clients
        may: permissions; all if None

    Returns:
        the key, which is stored nowhere, and the number of keys that this name has now

    Raises:
        ConfigError: the name, the weight or the file cannot be used
    """
    key = _KEY_PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
    digest = hashlib.sha256(key.encode()).hexdigest()
    try:
        entry = Key(name=name, sha256=digest, weight=weight, may=frozenset(may or _ALL_PERMISSIONS))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(f"{first['loc'][0]}: {one_line(first['msg'])}") from None
    lines = f"- name: {entry.name!r}\n  sha256: {entry.sha256!r}\n  weight: {entry.weight!r}\n"
    lines += "" if may is None else f"  may: {sorted(entry.may)}\n"
    with _exclusive(path):
        before = _read_entries(path) if path.exists() else ()
        problem = "cannot append to a list of this form; start each entry with `- ` in the first column"
        _replace(path, _read_text(path) + lines, [*before, entry], problem)
    return key, 1 + sum(entry.name == name for entry in before)


def remove_keys(path: Path, name: str) -> int:
    """Remove all keys of a name from the keys file and keep its other lines as they are.

    Returns:
        the number of removed keys

    Raises:
        ConfigError: no key has this name, none would be left, or the file cannot be used
    """
    with _exclusive(path):
        before = _read_entries(path)
        after = [entry for entry in before if entry.name != name]
        if len(after) == len(before):
            known = ", ".join(sorted({entry.name for entry in before})) or "none"
            raise ConfigError(f"{path}: no key is named {name!r}; the file has {known}")
        if not after:
            remedy = "a service needs one: create another first, or stop the service and delete the file"
            raise ConfigError(f"{path}: {name!r} has the only keys of the file; {remedy}")
        problem = "cannot remove an entry that has no lines of its own; edit the file by hand"
        text = _without(_read_text(path), [entry.name == name for entry in before])
        _replace(path, text, after, problem)
    return len(before) - len(after)


def _without(text: str, removed: Sequence[bool]) -> str:
    """Cut the marked entries out of a YAML list; unchanged if its entries are not one block of lines each."""
    entries = list(_ENTRY.finditer(text))
    if len(entries) != len(removed):
        return text
    for entry, remove in reversed(list(zip(entries, removed, strict=True))):
        if remove:
            text = text[: entry.start()] + text[entry.end() :]
    return text


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Exclude other writers of the file; report what the folder or the disk refuses as a ConfigError."""
    try:
        with folder_lock(path.resolve().parent):
            yield
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None


def _read_text(path: Path) -> str:
    """Return the file's text with a final line end, which an editor may have left out."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return text if not text or text.endswith("\n") else f"{text}\n"


def _replace(path: Path, text: str, expected: list[Key], problem: str) -> None:
    """Replace the file if the new text holds exactly the expected keys; else raise `problem`."""
    try:
        correct = _parse(text) == expected
    except ValueError:  # not YAML, or not a list of keys
        correct = False
    if not correct:
        raise ConfigError(f"{path}: {problem}")
    write_atomically(path, text.encode(), mode=0o600, preserve=True)
