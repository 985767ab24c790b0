"""ModelFiles: complete files or none, from a folder, the hub's cache, a hub and the web."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from reward_service.cli.main import main
from reward_service.config import Origin
from reward_service.engine import files as model_files
from reward_service.engine.files import ModelFiles, ProgressMeter
from reward_service.engine.types import ModelError
from tests.support.service.checkpoints import Checkpoints, service_section

REVISION = "0123456789abcdef0123456789abcdef01234567"
CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@contextmanager
def serve_files(
    bodies: dict[str, bytes], content_length: int | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Run a web server that the hub's client accepts as well; yield its address and the requested paths.

    Args:
        bodies: response body by path
        content_length: value of the header, if other than the body's length
    """
    requested: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requested.append(self.path)
            body = bodies.get(self.path)
            if body is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(content_length or len(body)))
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", REVISION)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815 - the server's own naming

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requested
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches of the hub and of web downloads."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def unset_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def refuse_proxy(*_: object, **__: object) -> str:
    """Raise what the hub's HTTP library raises for a proxy that it cannot use."""
    raise ImportError("Using SOCKS proxy me:hunter2@squid, but the 'socksio' package is not installed.")


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def refusal_message(origin: Origin, name: str, sha256: str | None = None, **options: bool) -> str:
    with pytest.raises(ModelError) as caught:
        ModelFiles(**options).get(origin, name, sha256)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def fill_hub_cache(cache: Path, repo: str, folder: Path) -> None:
    """Write the hub client's cache layout: blobs by hash, a snapshot of links, a ref."""
    root = cache / "hub" / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / REVISION
    for part in (root / "blobs", root / "refs", snapshot):
        part.mkdir(parents=True)
    (root / "refs" / "main").write_text(REVISION)
    for file in folder.iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        (root / "blobs" / digest).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{digest}")


# ---------------------------------------------------------------------------------------------------- the web


def test_web_file_is_downloaded_once(cache: Path) -> None:
    """Under its own name, with its hash verified; a `+` in the name is quoted in the URL."""
    with serve_files({"/models/a%2Bb.pth": CONTENT}) as (address, requested):
        origin = Origin(url=f"{address}/models")
        for _ in range(2):
            file = ModelFiles().get(origin, "a+b.pth", SHA256)
    assert file.path.read_bytes() == CONTENT
    assert (file.size_bytes, file.sha256, file.source) == (7000, SHA256, f"{address}/models/a+b.pth")
    assert requested == ["/models/a%2Bb.pth"]
    assert files_in(cache) == [file.path]


@pytest.mark.parametrize(
    ("body", "content_length", "words"),
    [(CONTENT[:-1], None, f"expected sha256 {SHA256}, found"), (CONTENT, 9999, "cannot be downloaded")],
    ids=["another file", "truncated"],
)
def test_wrong_or_truncated_download_leaves_no_file(
    body: bytes, content_length: int | None, words: str, cache: Path
) -> None:
    """Neither the file nor a temporary one; the next attempt starts again and succeeds."""
    with serve_files({"/x.pth": body}, content_length) as (address, _):
        assert words in refusal_message(Origin(url=address), "x.pth", SHA256)
    assert files_in(cache) == []
    with serve_files({"/x.pth": CONTENT}) as (address, _):
        assert ModelFiles().get(Origin(url=address), "x.pth", SHA256).sha256 == SHA256


def test_full_disk_leaves_no_partial_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The temporary file is removed and the message names the cause."""

    class FullDisk(type(Path())):  # type: ignore[misc]
        def open(self, *arguments: Any, **options: Any) -> Any:
            file = super().open(*arguments, **options)
            file.write(b"half")
            file.close()
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_files, "web_cache_folder", lambda: FullDisk(cache))
    with serve_files({"/x.pth": CONTENT}) as (address, _):
        assert "No space left on device" in refusal_message(Origin(url=address), "x.pth", SHA256)
    assert files_in(cache) == []


def test_leftover_of_a_killed_download_is_ignored(cache: Path) -> None:
    """A temporary file has another name than the file."""
    folder = model_files.web_cache_folder() / SHA256[:16]
    folder.mkdir(parents=True)
    (folder / "x.pth.0123.part").write_bytes(CONTENT[:10])
    with serve_files({"/x.pth": CONTENT}) as (address, requested):
        assert ModelFiles().get(Origin(url=address), "x.pth", SHA256).size_bytes == len(CONTENT)
    assert len(requested) == 1


def test_web_download_errors_name_the_address(cache: Path) -> None:
    """No hash, no connection, no permission to download, and a 404."""
    nowhere = Origin(url="http://127.0.0.1:9")
    assert "needs its sha256" in refusal_message(nowhere, "x.pth")
    assert "http://127.0.0.1:9/x.pth: cannot be downloaded" in refusal_message(nowhere, "x.pth", SHA256)
    assert "reward-service download" in refusal_message(nowhere, "x.pth", SHA256, download=False)
    with serve_files({}) as (address, _):
        assert "404" in refusal_message(Origin(url=address), "x.pth", SHA256)


@pytest.mark.parametrize("proxy", ["socks5h://me:hunter2@squid:1080", "ftp://me:hunter2@squid", "http://["])
def test_download_through_an_unusable_proxy_is_refused_in_one_line(
    proxy: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the web and from the hub, with what to install or unset, and without the password."""
    unset_proxies(monkeypatch)
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse_proxy)
    for origin in (Origin(url="https://models.invalid"), Origin(repo="a/b", revision=REVISION)):
        message = refusal_message(origin, "x.pth", SHA256)
        assert "invalid proxy configuration: ALL_PROXY" in message
        assert "unset ALL_PROXY" in message
        assert "hunter2" not in message


def test_failed_download_names_the_proxy(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that does not respond is the likely cause; a loopback address needs none."""
    unset_proxies(monkeypatch)
    monkeypatch.setenv("ALL_PROXY", "http://me:hunter2@127.0.0.1:9")
    message = refusal_message(Origin(url="https://models.invalid"), "x.pth", SHA256)
    assert "through the proxy 127.0.0.1:9 (ALL_PROXY)" in message
    assert "hunter2" not in message
    with serve_files({"/x.pth": CONTENT}) as (address, _):
        assert ModelFiles().get(Origin(url=address), "x.pth", SHA256).size_bytes == len(CONTENT)


# ------------------------------------------------------------------------------------------------ the hub


def test_hub_cache_is_used_offline(cache: Path, checkpoints: Checkpoints) -> None:
    """A populated cache is enough, and a file that is not in it is refused at once."""
    fill_hub_cache(cache, "some/clip", checkpoints.clip)
    origin = Origin(repo="some/clip", revision=REVISION)
    file = ModelFiles().get(origin, "model.safetensors")
    assert file.path.read_bytes() == (checkpoints.clip / "model.safetensors").read_bytes()
    assert file.source == f"some/clip@{REVISION}/model.safetensors"
    assert "not in the hub cache" in refusal_message(origin, "nothing.pt")
    assert "reward-service download" in refusal_message(origin, "nothing.pt", download=False)


def test_corrupt_hub_file_is_detected_without_a_configured_hash(
    cache: Path, checkpoints: Checkpoints
) -> None:
    """The cache names a blob by its hash."""
    fill_hub_cache(cache, "some/clip", checkpoints.clip)
    origin = Origin(repo="some/clip", revision=REVISION)
    path = ModelFiles().get(origin, "model.safetensors").path.resolve()
    path.write_bytes(path.read_bytes()[:-1])
    assert f"expected sha256 {path.name}, found " in refusal_message(origin, "model.safetensors")


def hub_config(checkpoints: Checkpoints, folder: Path, head_address: str) -> Path:
    """Write a configuration with the towers on the hub and the head on a web server."""
    section: Any = service_section()
    for name in section["towers"]:
        origin = {"repo": f"some/{name}", "revision": REVISION}
        section["towers"][name]["origin"] = origin
    section["towers"]["hps"]["weights"]["sha256"] = hashlib.sha256(
        (checkpoints.hps / "HPS.pt").read_bytes()
    ).hexdigest()
    head = section["evaluators"]["aesthetic"]["head"]
    head["origin"] = {"url": head_address}
    head["weights"]["sha256"] = hashlib.sha256(checkpoints.head.read_bytes()).hexdigest()
    section["calibration"] = str(checkpoints.folder / "calibration.json")
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"service": section}))
    return path


@pytest.mark.slow
def test_download_then_list_evaluators_offline(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """From a hub and a web server into an empty cache; then both may be gone."""
    bodies = {"/head.pth": checkpoints.head.read_bytes()}
    for name, folder in (("clip", "clip"), ("pickscore", "pickscore"), ("hps", "hps")):
        for file in (checkpoints.folder / folder).iterdir():
            bodies[f"/some/{name}/resolve/{REVISION}/{file.name}"] = file.read_bytes()
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_CACHE", None)

    def run(command: str, *more: str, **changes: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "reward_service", command, "--config", str(config), *more]
        return subprocess.run(
            line, env=environment | changes, capture_output=True, text=True, timeout=120, check=False
        )

    with serve_files(bodies) as (address, _):
        config = hub_config(checkpoints, tmp_path, address)
        early = run("evaluators")
        fetched = run("download", HF_ENDPOINT=address, HF_HUB_OFFLINE="0")
    assert early.returncode == 2
    assert "fetch it first: reward-service download" in early.stderr
    assert fetched.returncode == 0, fetched.stderr
    *listed, total = fetched.stdout.splitlines()
    assert total.startswith("12 files, ")
    assert [line.split()[0] for line in listed if line.endswith("HPS.pt")] == [
        hashlib.sha256((checkpoints.hps / "HPS.pt").read_bytes()).hexdigest()
    ]
    offline = run("evaluators", "--json")
    assert offline.returncode == 0, offline.stderr
    assert all(entry["fingerprint"] for entry in json.loads(offline.stdout)["evaluators"])


def test_download_names_the_failed_file(
    checkpoints: Checkpoints, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, exit code 2, and no total."""
    for name in ("clip", "pickscore", "hps"):
        fill_hub_cache(cache, f"some/{name}", checkpoints.folder / name)
    config = hub_config(checkpoints, cache, "http://127.0.0.1:9")
    with pytest.raises(SystemExit) as exited:
        main(["download", "--config", str(config)])
    output = capsys.readouterr()
    assert (exited.value.code, output.out) == (2, "")
    assert "http://127.0.0.1:9/head.pth: cannot be downloaded" in output.err
    assert len(output.err.splitlines()) == 1


# ------------------------------------------------------------------------------------------------ progress


def test_only_long_work_reports_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """After two seconds, then every five seconds: bytes done and bytes in all."""
    now, reports = [0.0], []
    monkeypatch.setattr("reward_service.engine.files.time.monotonic", lambda: now[0])
    meter = ProgressMeter(reports.append, "checking x", 4_000_000_000)
    for now[0] in (0.5, 1.9, 2.1, 4.0, 7.0, 7.2):
        meter.add(500_000_000)
    assert reports == ["checking x: 1.50 of 4.00 GB", "checking x: 3.00 of 4.00 GB"]
