"""Keys: who gets in, what a key may do, and how the file is read, written and read again."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from reward_service.cli.main import main
from reward_service.config import Auth, ServiceConfig
from reward_service.engine.engine import RewardEngine
from reward_service.scoring.auth import Client, Keyring, load_keys, new_key, remove_keys
from reward_service.scoring.service import ScoringService
from reward_service.settings import ConfigError
from reward_service.web.app import create_app
from tests.support.service.serving import judging


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


@pytest.fixture(scope="module")
def service(config: ServiceConfig, engine: RewardEngine) -> Iterator[ScoringService]:
    with judging(config, engine) as service:
        yield service


def locked(service: ScoringService, path: Path, **auth: Any) -> FastAPI:
    service.config = service.config.model_copy(update={"auth": Auth(keys=path, **auth)})
    return create_app(service.config, service)


def get(app: FastAPI, path: str, key: str | None = None, **headers: str) -> httpx.Response:
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://judge") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(ask())


def test_a_new_key_lets_in_and_only_its_hash_is_kept(path: Path) -> None:
    """The file holds the sha256 of the key that was shown, and only its owner may read it."""
    key, count = new_key(path, "trainer", weight=2.5)
    assert count == 1
    assert key not in path.read_text()
    assert hashlib.sha256(key.encode()).hexdigest() in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    found = Keyring(path).client(key, "fold-3")
    assert found == Client("trainer", "fold-3", weight=2.5)
    assert Keyring(path).client(key[:-1]) is None
    assert Keyring(path).client("") is None


def test_a_client_may_have_two_keys(path: Path) -> None:
    """While a key is changed both it and the next one are the same client's."""
    (old, _), (new, count) = new_key(path, "trainer"), new_key(path, "trainer")
    ring = Keyring(path)
    assert count == 2
    assert ring.client(old) == ring.client(new) == Client("trainer")


def test_a_missing_line_end_does_not_spoil_the_file(path: Path) -> None:
    """A key is appended correctly to a file that an editor left without a last line end."""
    new_key(path, "a")
    path.write_text(path.read_text().rstrip("\n"))
    new_key(path, "b")
    assert [entry.name for entry in load_keys(path)] == ["a", "b"]


@pytest.mark.parametrize("text", ["", "# nobody yet\n", "---\n"])
def test_a_file_without_keys_gets_its_first(path: Path, text: str) -> None:
    """Comments are not in the way."""
    path.write_text(text)
    path.chmod(0o600)
    new_key(path, "a")
    assert [entry.name for entry in load_keys(path)] == ["a"]


@pytest.mark.parametrize("form", ["[{{name: a, sha256: {0}}}]", "  - name: a\n    sha256: {0}\n"])
def test_a_list_that_cannot_be_appended_to_stays_as_it_is(path: Path, form: str) -> None:
    """In brackets or indented: valid, but one more entry behind it would lock everybody out."""
    path.write_text(form.format("'" + "0" * 64 + "'"))
    path.chmod(0o600)
    before = path.read_text()
    with pytest.raises(ConfigError, match="at the start of a line"):
        new_key(path, "b")
    assert path.read_text() == before
    assert [entry.name for entry in load_keys(path)] == ["a"]


HASH = "0" * 64
BROKEN = {
    "empty": ("", "no keys"),
    "no keys": ("[]", "no keys"),
    "not YAML": ("- [", "not a YAML list"),
    "no hash": ("- name: a", "sha256"),
    "a key for a hash": ("- {name: a, sha256: rk_secret}", "sha256"),
    "unknown field": (f"- {{name: a, sha256: '{HASH}', wieght: 2}}", "wieght"),
    "no weight": (f"- {{name: a, sha256: '{HASH}', weight: 0}}", "weight"),
    "twice": (f"- {{name: a, sha256: '{HASH}'}}\n- {{name: b, sha256: '{HASH}'}}", "twice"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_told_in_one_line(path: Path, name: str) -> None:
    """Whatever is wrong with the file: one line that names it, and nothing that was in it as a hash."""
    text, told = BROKEN[name]
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=told) as error:
        load_keys(path)
    assert "\n" not in str(error.value)
    assert "rk_secret" not in str(error.value)


def test_a_file_that_others_may_write_to_is_refused(path: Path) -> None:
    """Whoever may append to the file could let himself in."""
    new_key(path, "a")
    path.chmod(0o620)
    with pytest.raises(ConfigError, match="others may write"):
        load_keys(path)


def test_a_broken_file_keeps_the_old_keys(path: Path) -> None:
    """Read again, a broken or missing file changes nothing and is told; a mended one counts at once."""
    key, _ = new_key(path, "a")
    said = list[str]()
    ring = Keyring(path, said.append)
    path.write_text("- nonsense")
    ring.reload()
    path.unlink()
    ring.reload()
    assert ring.client(key) is not None
    other, _ = new_key(path, "b")
    ring.reload()
    assert ring.client(key) is None
    assert ring.client(other) == Client("b")
    assert [line.startswith("the keys stay") for line in said] == [True, True, False]


def test_a_changed_file_is_noticed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new key counts at once, a removed one for a second more, without anybody's signal."""
    key, _ = new_key(path, "a")
    said, now = list[str](), [100.0]
    monkeypatch.setattr("reward_service.scoring.auth.time.monotonic", lambda: now[0])
    ring = Keyring(path, said.append)
    other, _ = new_key(path, "b")
    assert ring.client(other) == Client("b")
    assert ring.client(key) == Client("a")
    remove_keys(path, "a")
    now[0] += 1.0
    assert ring.client(key) is None
    assert len(said) == 2


def test_a_broken_change_is_told_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that became unusable does not fill the log."""
    key, _ = new_key(path, "a")
    said, now = list[str](), [100.0]
    monkeypatch.setattr("reward_service.scoring.auth.time.monotonic", lambda: now[0])
    ring = Keyring(path, said.append)
    path.write_text("- nonsense")
    for _ in range(3):
        now[0] += 1
        assert ring.client(key) == Client("a")
    assert len(said) == 1


def test_keys_are_removed_by_name(path: Path) -> None:
    """All keys of the name go, the others and every comment stay, and the file is still its owner's alone."""
    made = {name: new_key(path, name)[0] for name in ("a", "b", "c")}
    new_key(path, "b")
    path.write_text("# ours\n" + path.read_text().replace("- name: 'c'", "# of c\n\n- name: 'c'"))
    assert remove_keys(path, "b") == 2
    ring = Keyring(path)
    assert [name for name, key in made.items() if ring.client(key)] == ["a", "c"]
    assert [line for line in path.read_text().splitlines() if line.startswith("#")] == ["# ours", "# of c"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("name", "told"), [("z", "no key is named 'z'; it has a, b"), ("a", None)], ids=["unknown", "known"]
)
def test_what_cannot_be_removed_is_told(path: Path, name: str, told: str | None) -> None:
    """An unknown name, the last name, and a form without lines of its own: one line, the file as it was."""
    new_key(path, "a")
    new_key(path, "b")
    if told is None:
        remove_keys(path, "b")
        told = "there is no key beside 'a'"
    before = path.read_text()
    with pytest.raises(ConfigError, match=told):
        remove_keys(path, name)
    assert path.read_text() == before


def test_owner_mode_and_links_stay(path: Path) -> None:
    """Whoever changes the file, whoever reads it still can; a link still leads to it."""
    new_key(path, "a")
    path.chmod(0o640)
    if os.getuid() == 0:
        os.chown(path, 12345, 12346)
    link = path.with_name("link.yaml")
    link.symlink_to(path)
    before = path.stat()
    key, _ = new_key(link, "b")
    remove_keys(link, "a")
    assert link.is_symlink()
    assert Keyring(path).client(key) == Client("b")
    after = path.stat()
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)


def test_a_full_disk_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is as it was, and what was begun beside it is gone."""
    new_key(path, "a")
    before = path.read_text()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("reward_service.scoring.auth.os.fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        new_key(path, "b")
    assert path.read_text() == before
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_entries_on_one_line_are_not_taken_apart(path: Path) -> None:
    """A list in brackets has to be edited by hand; it stays as it is."""
    path.write_text(f"[{{name: a, sha256: '{'0' * 64}'}}, {{name: b, sha256: '{'1' * 64}'}}]\n")
    path.chmod(0o600)
    before = path.read_text()
    with pytest.raises(ConfigError, match="edit it"):
        remove_keys(path, "a")
    assert path.read_text() == before


def test_keys_made_at_once_are_all_there(path: Path) -> None:
    """Several commands at a time lose no key."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: new_key(path, f"k{number}"), range(24)))
        list(pool.map(lambda number: remove_keys(path, f"k{number}"), range(12)))
    assert sorted(entry.name for entry in load_keys(path)) == sorted(f"k{n}" for n in range(12, 24))


@pytest.mark.parametrize("route", ["/v1/evaluators", "/metrics"])
def test_a_key_is_needed(service: ScoringService, path: Path, route: str) -> None:
    """Without a key, with a wrong one or another scheme: 401 with a challenge; with it: in."""
    key, _ = new_key(path, "a")
    app = locked(service, path)
    for answer in (
        get(app, route),
        get(app, route, "rk_wrong"),
        get(app, route, ""),
        get(app, route, Authorization=f"Basic {key}"),
        get(app, route, Authorization=key),
    ):
        assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert key not in answer.text
    assert get(app, route, key).status_code == 200
    assert get(app, route, Authorization=f"bearer {key}").status_code == 200


def test_what_needs_no_key(service: ScoringService, path: Path) -> None:
    """Health, documentation and the page are for everybody; metrics where the configuration says so."""
    new_key(path, "a")
    app = locked(service, path, open_metrics=True)
    routes = ("/health/live", "/health/ready", "/docs", "/openapi.json", "/", "/metrics")
    assert {route: get(app, route).status_code for route in routes} == dict.fromkeys(routes, 200)
    assert get(app, "/v1/evaluators").status_code == 401


def test_a_key_may_be_for_metrics_only(service: ScoringService, path: Path) -> None:
    """A key that may not score is a 403, not a 401: another key would help, a better one not."""
    key, _ = new_key(path, "prometheus", may=["metrics"])
    app = locked(service, path)
    assert get(app, "/metrics", key).status_code == 200
    answer = get(app, "/v1/evaluators", key)
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")


def test_everybody_may_be_let_in_beside_keys(service: ScoringService, path: Path) -> None:
    """Where anonymous callers are allowed, no key is fine, and a wrong one is still a mistake."""
    key, _ = new_key(path, "a")
    app = locked(service, path, allow_anonymous=True)
    codes = [get(app, "/v1/evaluators", given).status_code for given in (None, key, "rk_wrong")]
    assert codes == [200, 200, 401]


def test_the_command_makes_a_key(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output is the key and nothing else."""
    with pytest.raises(SystemExit) as left:
        main(["keys", "new", "trainer", "--weight", "3", "--file", str(path)])
    assert left.value.code in (0, None)
    key = capsys.readouterr().out.strip()
    assert Keyring(path).client(key) == Client("trainer", weight=3.0)


def test_the_command_removes_a_client(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`keys remove NAME` is told on standard error; for a name that is not there it exits with 2."""
    for name in ("a", "b"):
        new_key(path, name, may=["score"])
    for code, told in ((0, "1 key of a removed"), (2, "no key is named 'a'")):
        with pytest.raises(SystemExit) as left:
            main(["keys", "remove", "a", "--file", str(path)])
        assert (left.value.code or 0) == code
        assert told in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["a b"], ["a", "--weight", "0"], ["a", "--weight", "nan"], ["ä"]])
def test_the_command_refuses_what_it_could_not_read(path: Path, arguments: list[str]) -> None:
    """Names and weights that the file may not hold are refused, and nothing is written."""
    with pytest.raises(SystemExit) as left:
        main(["keys", "new", *arguments, "--file", str(path)])
    assert left.value.code == 2
    assert not path.exists()
