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

import fcntl
import hashlib
import hmac
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, PositiveInt, StringConstraints, TypeAdapter, ValidationError

from reward_service.config import Sha256
from reward_service.settings import ConfigError, Settings, one_line

ClientName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
Permission = Literal["score", "metrics"]
_EVERYTHING: tuple[Permission, ...] = ("score", "metrics")

_PREFIX = "rk_"
_SECRET_BYTES = 32
_LOOK_EVERY_S = 1.0


class Key(Settings):
    """One entry of the file."""

    name: ClientName
    sha256: Sha256
    weight: Annotated[float, Field(ge=0.001, le=1000)] = 1.0
    max_pairs: PositiveInt | None = None
    may: frozenset[Permission] = frozenset(_EVERYTHING)


@dataclass(frozen=True)
class Client:
    """Who asks.

    Args:
        name: of the key; "" without one
        part: what `X-Client-Id` says: a part of the key's work, or who it is if there is no key
        weight: share of the device, that of all parts of a key together
        max_pairs: most pairs under way at a time; None for the service's limit
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
    """The keys of a file, which is read anew when it has changed.

    A new key counts at once, one that was removed for a second more at most.

    Args:
        note: told in one line what became of reading it anew

    Raises:
        ConfigError: the file cannot be used
    """

    def __init__(self, path: Path, note: Callable[[str], None] = lambda _: None) -> None:
        self._path, self._note = path, note
        self._seen, self._look_s = _state(path), time.monotonic() + _LOOK_EVERY_S
        self._keys = load_keys(path)

    def client(self, key: str, part: str = "") -> Client | None:
        """Whose key it is; None if nobody's. Among the keys, takes as long whatever was presented."""
        if time.monotonic() >= self._look_s:
            self._look()
        digest = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()
        found = self._find(digest)
        if found is None and self._look():
            found = self._find(digest)
        if found is None:
            return None
        return Client(found.name, part, found.weight, found.max_pairs, found.may)

    def _find(self, digest: str) -> Key | None:
        found = None
        for entry in self._keys:
            if hmac.compare_digest(entry.sha256, digest):
                found = entry
        return found

    def reload(self) -> None:
        """Read the file again; the keys stay as they are if it cannot be used."""
        self._seen = _state(self._path)
        try:
            self._keys = load_keys(self._path)
        except ConfigError as error:
            self._note(f"the keys stay as they were: {error}")
        else:
            self._note(f"keys: {len(self._keys)} read from {self._path}")

    def _look(self) -> bool:
        """Read the file again if it has changed, and say whether it had."""
        self._look_s = time.monotonic() + _LOOK_EVERY_S
        changed = _state(self._path) != self._seen
        if changed:
            self.reload()
        return changed


def _state(path: Path) -> tuple[int, ...] | None:
    """What tells that a file was changed or replaced; None without one."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size, found.st_mode


def load_keys(path: Path) -> tuple[Key, ...]:
    """Read a file of keys.

    Raises:
        ConfigError: it is missing, malformed, empty, or others than its owner may write to it
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


def new_key(
    path: Path, name: str, weight: float = 1.0, may: Sequence[Permission] | None = None
) -> tuple[str, int]:
    """Make a key and append its hash to a file, which is made if it is not there.

    Args:
        may: what it is for; everything if None

    Returns:
        the key, which is nowhere else, and how many keys of this name there are now

    Raises:
        ConfigError: the name, the weight or the file cannot be used
    """
    key = _PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
    digest = hashlib.sha256(key.encode()).hexdigest()
    try:
        entry = Key(name=name, sha256=digest, weight=weight, may=frozenset(may or _EVERYTHING))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(f"{first['loc'][0]}: {one_line(first['msg'])}") from None
    lines = f"- name: {entry.name!r}\n  sha256: {entry.sha256!r}\n  weight: {entry.weight!r}\n"
    lines += "" if may is None else f"  may: {sorted(entry.may)}\n"
    with _alone(path):
        before = _entries(path) if path.exists() else ()
        _replace(path, _appended(path, lines, [*before, entry]))
    return key, 1 + sum(entry.name == name for entry in before)


def remove_keys(path: Path, name: str) -> int:
    """Take all keys of a name out of a file, whose other lines stay as they are.

    Returns:
        how many there were

    Raises:
        ConfigError: there is none, there would be none left, or the file cannot be used
    """
    with _alone(path):
        before = _entries(path)
        after = [entry for entry in before if entry.name != name]
        if len(after) == len(before):
            raise ConfigError(f"{path}: no key is named {name!r}; it has {_listed(before)}")
        if not after:
            remedy = (
                "a service needs one to go on: make another first, or end the service and delete the file"
            )
            raise ConfigError(f"{path}: there is no key beside {name!r}; {remedy}")
        text = _without(path.read_text(encoding="utf-8"), [entry.name == name for entry in before])
        if text is None or _parsed(text) != after:
            raise ConfigError(f"{path}: its form is not one that lines can be taken out of; edit it")
        _replace(path, text)
    return len(before) - len(after)


def _without(text: str, leave: Sequence[bool]) -> str | None:
    """The lines of a list in YAML without those of some of its entries; None if these share lines."""
    lines = text.splitlines(keepends=True)
    for node, gone in reversed(list(zip(_nodes(text), leave, strict=True))):
        first, end = node.start_mark.line, node.end_mark.line + (node.end_mark.column > 0)
        if gone and not lines[first].startswith("- "):
            return None
        # What stands between two entries is about the next one.
        while not (said := lines[end - 1].strip()) or said.startswith("#"):
            end -= 1
        if gone:
            del lines[first:end]
    return "".join(lines)


def _nodes(text: str) -> list[yaml.Node]:
    document = yaml.compose(text)
    return list(document.value) if document else []


def _listed(entries: Sequence[Key]) -> str:
    return ", ".join(sorted({entry.name for entry in entries})) or "none"


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Nobody else changes the file meanwhile; what its folder or its disk refuses is a ConfigError."""
    try:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None


def _appended(path: Path, lines: str, expected: list[Key]) -> str:
    """The file's text with an entry behind it, which a list that is indented or in brackets cannot bear."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if text and not text.endswith("\n"):  # an editor may have left it out
        text += "\n"
    try:
        fits = _parsed(text + lines) == expected
    except (yaml.YAMLError, ValueError):
        fits = False
    if not fits:
        remedy = "begin each entry with `- ` at the start of a line"
        raise ConfigError(f"{path}: nothing can be appended to a list of this form; {remedy}")
    return text + lines


def _replace(path: Path, text: str) -> None:
    """Whole or not at all, whatever the disk does; owner and mode stay, or are this process's and 0600."""
    path = path.resolve()
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            if path.exists():
                before = path.stat()
                os.fchown(file.fileno(), before.st_uid, before.st_gid)
                os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode))
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
