"""Model files: located in a folder, the Hugging Face hub or at a web address, and verified by their hash.

A download has a temporary name until it is complete, so an interrupted one is never mistaken for the file.
Errors are one line: the file, what is expected, what was found, the remedy.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import httpx

from reward_service.client.proxies import describe_failure, describe_route, is_loopback
from reward_service.config import Origin
from reward_service.engine.types import ModelError
from reward_service.settings import one_line

#: Receives one line of text about the progress of long work.
ProgressCallback = Callable[[str], None]

CHUNK_BYTES = 1 << 20
_FIRST_REPORT_S, _REPORT_EVERY_S = 2.0, 5.0
_TIMEOUT_S = 30
_SHA256 = re.compile(r"[0-9a-f]{64}")
_REMEDY = "fetch it first: reward-service download"


@dataclass(frozen=True)
class LocalFile:
    """A file on this machine.

    Attributes:
        source: its name at its origin
        path: its path on this machine
        size_bytes: its size
        sha256: hash of its content, 64 hex digits
    """

    source: str
    path: Path
    size_bytes: int
    sha256: str


def no_progress(_: str) -> None:
    """Discard a progress report."""


class ModelFiles:
    """Files of configured origins, each downloaded and hashed once.

    Args:
        progress: receives progress reports of long work
        download: whether to download missing files
    """

    def __init__(self, progress: ProgressCallback = no_progress, *, download: bool = True) -> None:
        self._progress, self._download = progress, download
        self._hashed: dict[Path, LocalFile] = {}

    def get(self, origin: Origin, name: str, sha256: str | None = None) -> LocalFile:
        """Return one file of an origin; download it if necessary and allowed.

        Args:
            origin: folder, hub repository or web address
            name: name of the file at the origin
            sha256: expected hash of the content, if known

        Raises:
            ModelError: the file is missing, cannot be downloaded or has another hash
        """
        path = self._locate(origin, name, sha256)
        file = self.local(path, f"{origin}/{name}")
        expected = sha256 or _hash_by_hub_cache(path)
        if expected is not None and file.sha256 != expected:
            found = f"expected sha256 {expected}, found {file.sha256} in {file.size_bytes} bytes"
            raise ModelError(f"{path}: {found}; delete it and fetch it again")
        return file

    def local(self, path: Path, source: str) -> LocalFile:
        """Return a file that needs no download.

        Raises:
            ModelError: it cannot be read
        """
        if path not in self._hashed:
            try:
                size = path.stat().st_size
                digest = file_sha256(path, ProgressMeter(self._progress, f"checking {source}", size))
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
        if origin.repo is not None:
            return self._from_hub(origin, name)
        return self._from_web(origin, name, sha256)

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
            unreachable = f"and the hub cannot be reached{describe_route(constants.ENDPOINT)}"
            remedy = _REMEDY if local_only else f"{unreachable}; connect, or use a folder"
            raise ModelError(f"{origin}/{name}: {cache}; {remedy}") from None
        except Exception as error:  # noqa: BLE001 - the exceptions of its HTTP client depend on the version
            cause = describe_failure(constants.ENDPOINT, error)
            raise ModelError(f"{origin}/{name}: cannot be downloaded ({one_line(cause)})") from None
        return Path(path)

    def _from_web(self, origin: Origin, name: str, sha256: str | None) -> Path:
        if sha256 is None:
            raise ModelError(
                f"{origin}/{name}: a file from a web address needs its sha256 in the configuration"
            )
        path = web_cache_folder() / sha256[:16] / name
        if path.is_file():
            return path
        if not self._download:
            raise ModelError(f"{origin}/{name}: not in the cache {path.parent}; {_REMEDY}")
        url = f"{origin.url}/{quote(name)}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._download_to(path, url, sha256)
        except ModelError:
            raise
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ImportError, ValueError) as error:
            # httpx raises the last two for proxies that it cannot use.
            cause = one_line(describe_failure(url, error))
            raise ModelError(f"{origin}/{name}: cannot be downloaded ({cause})") from None
        return path

    def _download_to(self, path: Path, url: str, sha256: str) -> None:
        """Download into a temporary file in the same folder, and rename it to `path` when complete."""
        part = path.with_name(f"{path.name}.{uuid4().hex}.part")
        digest = hashlib.sha256()
        try:
            with (
                httpx.stream(
                    "GET",
                    url,
                    follow_redirects=True,
                    timeout=_TIMEOUT_S,
                    trust_env=not is_loopback(httpx.URL(url).host),
                ) as response,
                part.open("xb") as file,
            ):
                response.raise_for_status()
                total = int(response.headers.get("content-length", 0))
                meter = ProgressMeter(self._progress, f"downloading {path.name}", total)
                for chunk in response.iter_bytes(CHUNK_BYTES):
                    file.write(chunk)
                    digest.update(chunk)
                    meter.add(len(chunk))
            if digest.hexdigest() != sha256:
                raise ModelError(f"{url}: expected sha256 {sha256}, found {digest.hexdigest()}")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def web_cache_folder() -> Path:
    """Return the cache folder for files from web addresses: below Hugging Face's, so there is one to copy."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "reward_service"


def _hash_by_hub_cache(path: Path) -> str | None:
    """Return the hash by which the hub cache names a large file; None for other files."""
    name = path.resolve().name if path.is_symlink() else ""
    return name if _SHA256.fullmatch(name) else None


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file.

    Raises:
        ModelError: the file is unreadable or holds something else
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON ({one_line(error)}); fetch it again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


class ProgressMeter:
    """Report the progress of long work: after two seconds, then every five seconds.

    Args:
        progress: receives the reports
        label: prefix of every report
        total_bytes: size of the whole work, 0 if unknown
    """

    def __init__(self, progress: ProgressCallback, label: str, total_bytes: int) -> None:
        self._progress, self._label, self._total_bytes = progress, label, total_bytes
        self._done_bytes, self._next_report_s = 0, time.monotonic() + _FIRST_REPORT_S

    def add(self, count: int) -> None:
        """Count bytes as done."""
        self._done_bytes += count
        if time.monotonic() >= self._next_report_s:
            self._next_report_s = time.monotonic() + _REPORT_EVERY_S
            total = f" of {self._total_bytes / 1e9:.2f}" if self._total_bytes else ""
            self._progress(f"{self._label}: {self._done_bytes / 1e9:.2f}{total} GB")


def file_sha256(path: Path, meter: ProgressMeter) -> str:
    """Return the sha256 of a file in hex, read through one small buffer.

    Raises:
        OSError: it cannot be read
    """
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            meter.add(count)
    return digest.hexdigest()
