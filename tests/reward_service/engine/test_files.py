"""Files by origin: whole or not at all, from a folder, the hub's cache, a hub and the web."""

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
from reward_service.engine import files as origins
from reward_service.engine.files import Files, Meter, ModelError
from tests.support.service.checkpoints import Checkpoints, service_section

REVISION = "0123456789abcdef0123456789abcdef01234567"
CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@contextmanager
def web(answers: dict[str, bytes], promised: int | None = None) -> Iterator[tuple[str, list[str]]]:
    """A web server, also with what the hub's client asks of one; yields its address and the paths asked for.

    Args:
        promised: Content-Length, if other than the body's
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            body = answers.get(self.path)
            if body is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(promised or len(body)))
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
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches of the hub and of the web."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def refused(origin: Origin, name: str, sha256: str | None = None, **options: bool) -> str:
    with pytest.raises(ModelError) as caught:
        Files(**options).get(origin, name, sha256)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def fill_hub_cache(cache: Path, repo: str, folder: Path) -> None:
    """As the hub's client lays a download out: blobs by hash, a snapshot of links, a ref."""
    root = cache / "hub" / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / REVISION
    for part in (root / "blobs", root / "refs", snapshot):
        part.mkdir(parents=True)
    (root / "refs" / "main").write_text(REVISION)
    for file in folder.iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        (root / "blobs" / digest).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{digest}")


# ------------------------------------------------------------------------------------------------ the web


def test_a_file_from_the_web_is_fetched_once(cache: Path) -> None:
    """Under its own name, hash checked; a `+` in the name survives the address."""
    with web({"/models/a%2Bb.pth": CONTENT}) as (address, asked):
        origin = Origin(url=f"{address}/models")
        for _ in range(2):
            file = Files().get(origin, "a+b.pth", SHA256)
    assert file.path.read_bytes() == CONTENT
    assert (file.size_bytes, file.sha256, file.source) == (7000, SHA256, f"{address}/models/a+b.pth")
    assert asked == ["/models/a%2Bb.pth"]
    assert files_in(cache) == [file.path]


@pytest.mark.parametrize(
    ("body", "promised", "words"),
    [(CONTENT[:-1], None, f"expected sha256 {SHA256}, found"), (CONTENT, 9999, "cannot be downloaded")],
    ids=["another file", "cut off"],
)
def test_a_wrong_or_cut_download_leaves_nothing(
    body: bytes, promised: int | None, words: str, cache: Path
) -> None:
    """Neither under the file's name nor beside it; the next try starts afresh and succeeds."""
    with web({"/x.pth": body}, promised) as (address, _):
        assert words in refused(Origin(url=address), "x.pth", SHA256)
    assert files_in(cache) == []
    with web({"/x.pth": CONTENT}) as (address, _):
        assert Files().get(Origin(url=address), "x.pth", SHA256).sha256 == SHA256


def test_a_full_disk_leaves_no_half_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part is taken away and the cause is told."""

    class FullDisk(type(Path())):  # type: ignore[misc]
        def open(self, *arguments: Any, **options: Any) -> Any:
            file = super().open(*arguments, **options)
            file.write(b"half")
            file.close()
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(origins, "web_cache", lambda: FullDisk(cache))
    with web({"/x.pth": CONTENT}) as (address, _):
        assert "No space left on device" in refused(Origin(url=address), "x.pth", SHA256)
    assert files_in(cache) == []


def test_what_a_killed_download_left_is_not_taken_for_the_file(cache: Path) -> None:
    """A part has another name than the file."""
    folder = origins.web_cache() / SHA256[:16]
    folder.mkdir(parents=True)
    (folder / "x.pth.0123.part").write_bytes(CONTENT[:10])
    with web({"/x.pth": CONTENT}) as (address, asked):
        assert Files().get(Origin(url=address), "x.pth", SHA256).size_bytes == len(CONTENT)
    assert len(asked) == 1


def test_the_web_needs_a_hash_and_an_answer(cache: Path) -> None:
    """Each told with the address."""
    nowhere = Origin(url="http://127.0.0.1:9")
    assert "needs its sha256" in refused(nowhere, "x.pth")
    assert "http://127.0.0.1:9/x.pth: cannot be downloaded" in refused(nowhere, "x.pth", SHA256)
    assert "reward-service download" in refused(nowhere, "x.pth", SHA256, download=False)
    with web({}) as (address, _):
        assert "404" in refused(Origin(url=address), "x.pth", SHA256)


# ------------------------------------------------------------------------------------------------ the hub


def test_the_hub_cache_serves_offline(cache: Path, checkpoints: Checkpoints) -> None:
    """A populated cache is enough, and what is not in it is told at once."""
    fill_hub_cache(cache, "some/clip", checkpoints.clip)
    origin = Origin(repo="some/clip", revision=REVISION)
    file = Files().get(origin, "model.safetensors")
    assert file.path.read_bytes() == (checkpoints.clip / "model.safetensors").read_bytes()
    assert file.source == f"some/clip@{REVISION}/model.safetensors"
    assert "not in the hub cache" in refused(origin, "nothing.pt")
    assert "reward-service download" in refused(origin, "nothing.pt", download=False)


def test_a_spoilt_blob_is_found_without_a_configured_hash(cache: Path, checkpoints: Checkpoints) -> None:
    """The cache's own name of it is its hash."""
    fill_hub_cache(cache, "some/clip", checkpoints.clip)
    origin = Origin(repo="some/clip", revision=REVISION)
    path = Files().get(origin, "model.safetensors").path.resolve()
    path.write_bytes(path.read_bytes()[:-1])
    assert f"expected sha256 {path.name}, found " in refused(origin, "model.safetensors")


def hub_config(checkpoints: Checkpoints, folder: Path, head_address: str) -> Path:
    """The test's models as if they were published: towers on the hub, the head in the web."""
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


def test_download_then_serve_offline(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """From a hub and a web server into an empty cache; then both may be gone."""
    answers = {"/head.pth": checkpoints.head.read_bytes()}
    for name, folder in (("clip", "clip"), ("pickscore", "pickscore"), ("hps", "hps")):
        for file in (checkpoints.folder / folder).iterdir():
            answers[f"/some/{name}/resolve/{REVISION}/{file.name}"] = file.read_bytes()
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_CACHE", None)

    def run(command: str, *more: str, **changes: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "reward_service", command, "--config", str(config), *more]
        return subprocess.run(
            line, env=environment | changes, capture_output=True, text=True, timeout=120, check=False
        )

    with web(answers) as (address, _):
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


def test_download_names_what_failed(
    checkpoints: Checkpoints, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, code 2, and no total."""
    for name in ("clip", "pickscore", "hps"):
        fill_hub_cache(cache, f"some/{name}", checkpoints.folder / name)
    config = hub_config(checkpoints, cache, "http://127.0.0.1:9")
    with pytest.raises(SystemExit) as ended:
        main(["download", "--config", str(config)])
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    assert "http://127.0.0.1:9/head.pth: cannot be downloaded" in said.err
    assert len(said.err.splitlines()) == 1


# ------------------------------------------------------------------------------------------------ progress


def test_long_work_is_told_and_short_work_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second second on, every five seconds, how much of how much."""
    now, said = [0.0], []
    monkeypatch.setattr("reward_service.engine.files.time.monotonic", lambda: now[0])
    meter = Meter(said.append, "checking x", 4_000_000_000)
    for now[0] in (0.5, 1.9, 2.1, 4.0, 7.0, 7.2):
        meter.add(500_000_000)
    assert said == ["checking x: 1.50 of 4.00 GB", "checking x: 3.00 of 4.00 GB"]
