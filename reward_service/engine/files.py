"""Files by origin: a folder, the hub or a web address. Found or fetched, then checked by their hash.

A file that is being fetched has a name of its own until it is whole, so that what was interrupted is never
taken for a file. Errors are one line: the file, what is expected, what was found, the remedy.

Files at hand, their hashes, and what is said while long work goes on. No torch, no network.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote
from uuid import uuid4

import httpx

from reward_service.config import Origin
from reward_service.settings import ConfigError, one_line

Note = Callable[[str], None]

CHUNK_BYTES = 1 << 20
_QUIET_S, _BETWEEN_S = 2.0, 5.0


class ModelError(ConfigError):
    """A model that cannot be used; the message is one line: the file, what is expected, what was found."""


def silent(_: str) -> None:
    """A note that nobody reads."""


class Meter:
    """Says how far long work has come; work of less than two seconds stays silent.

    Args:
        what: begins every line
        total: bytes in all, 0 if unknown
    """

    def __init__(self, note: Note, what: str, total: int) -> None:
        self._note, self._what, self._total = note, what, total
        self._done, self._next = 0, time.monotonic() + _QUIET_S

    def add(self, count: int) -> None:
        """Count bytes as done."""
        self._done += count
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _BETWEEN_S
            of = f" of {self._total / 1e9:.2f}" if self._total else ""
            self._note(f"{self._what}: {self._done / 1e9:.2f}{of} GB")


@dataclass(frozen=True)
class LocalFile:
    """A file at hand. `source` is how its origin calls it, `path` where it lies."""

    source: str
    path: Path
    size_bytes: int
    sha256: str


def file_sha256(path: Path, meter: Meter) -> str:
    """The hex sha256 of a file, read through one small buffer.

    Raises:
        OSError: it cannot be read
    """
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            meter.add(count)
    return digest.hexdigest()


_TIMEOUT_S = 30
_SHA256 = re.compile(r"[0-9a-f]{64}")
_REMEDY = "fetch it first: reward-service download"


class Files:
    """The files of origins, each fetched and hashed once.

    Args:
        note: told in words how long work goes on
        download: whether missing files are fetched
    """

    def __init__(self, note: Note = silent, *, download: bool = True) -> None:
        self._note, self._download = note, download
        self._hashed: dict[Path, LocalFile] = {}

    def get(self, origin: Origin, name: str, sha256: str | None = None) -> LocalFile:
        """One file of an origin.

        Args:
            sha256: what its content must hash to, if that is known

        Raises:
            ModelError: missing, not to be had, or of another hash
        """
        path = self._locate(origin, name, sha256)
        file = self.local(path, f"{origin}/{name}")
        expected = sha256 or _promised(path)
        if expected is not None and file.sha256 != expected:
            found = f"expected sha256 {expected}, found {file.sha256} in {file.size_bytes} bytes"
            raise ModelError(f"{path}: {found}; delete it and fetch it again")
        return file

    def local(self, path: Path, source: str) -> LocalFile:
        """A file that needs no fetching.

        Raises:
            ModelError: it cannot be read
        """
        if path not in self._hashed:
            try:
                size = path.stat().st_size
                digest = file_sha256(path, Meter(self._note, f"checking {source}", size))
            except OSError as error:
                raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from None
            self._hashed[path] = LocalFile(source, path, size, digest)
        return self._hashed[path]

    def _locate(self, origin: Origin, name: str, sha256: str | None) -> Path:
        if origin.folder is not None:
            path = origin.folder / name
            if not path.is_file():
                raise ModelError(f"{path}: no such file; correct the origin, or fetch the model there")
            return path
        return self._from_hub(origin, name) if origin.repo is not None else self._web(origin, name, sha256)

    def _from_hub(self, origin: Origin, name: str) -> Path:
        from huggingface_hub import constants, hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        local_only = not self._download
        try:
            path = hf_hub_download(
                str(origin.repo), name, revision=origin.revision, local_files_only=local_only
            )
        except LocalEntryNotFoundError:
            cache = f"not in the hub cache {constants.HF_HUB_CACHE}"
            remedy = _REMEDY if local_only else "and the hub cannot be reached; connect, or use a folder"
            raise ModelError(f"{origin}/{name}: {cache}; {remedy}") from None
        except Exception as error:  # noqa: BLE001 - the HTTP client beneath has another hierarchy by version
            raise ModelError(f"{origin}/{name}: cannot be downloaded ({one_line(error)[:160]})") from None
        return Path(path)

    def _web(self, origin: Origin, name: str, sha256: str | None) -> Path:
        if sha256 is None:
            raise ModelError(
                f"{origin}/{name}: a file from a web address needs its sha256 in the configuration"
            )
        path = web_cache() / sha256[:16] / name
        if path.is_file():
            return path
        if not self._download:
            raise ModelError(f"{origin}/{name}: not in the cache {path.parent}; {_REMEDY}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fetch(f"{origin.url}/{quote(name)}", path, sha256)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            cause = one_line(error)[:160] or type(error).__name__
            raise ModelError(f"{origin}/{name}: cannot be downloaded ({cause})") from None
        return path

    def _fetch(self, url: str, path: Path, sha256: str) -> None:
        """Fetch into a file beside `path` that takes its name once it is whole."""
        part = path.with_name(f"{path.name}.{uuid4().hex}.part")
        digest = hashlib.sha256()
        try:
            with (
                httpx.stream("GET", url, follow_redirects=True, timeout=_TIMEOUT_S) as answer,
                part.open("xb") as file,
            ):
                answer.raise_for_status()
                total = int(answer.headers.get("content-length", 0))
                meter = Meter(self._note, f"downloading {path.name}", total)
                for chunk in answer.iter_bytes(CHUNK_BYTES):
                    file.write(chunk)
                    digest.update(chunk)
                    meter.add(len(chunk))
            if digest.hexdigest() != sha256:
                raise ModelError(f"{url}: expected sha256 {sha256}, found {digest.hexdigest()}")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def web_cache() -> Path:
    """The folder of files from web addresses: within Hugging Face's, so that there is one to carry along."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "reward_service"


def _promised(path: Path) -> str | None:
    """The hash that the hub cache's own name of a large file promises."""
    name = path.resolve().name if path.is_symlink() else ""
    return name if _SHA256.fullmatch(name) else None
