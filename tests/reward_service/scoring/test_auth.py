"""API keys: authentication, permissions, and reading, changing and reloading the keys file."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import shlex
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from reward_service.cli.main import main
from reward_service.config import Auth, ServiceConfig, load_config
from reward_service.engine.engine import RewardEngine
from reward_service.scoring.auth import Client, Keyring, load_keys, new_key, remove_keys
from reward_service.scoring.service import ScoringService
from reward_service.settings import ConfigError
from reward_service.web.app import create_app
from tests.support.service.serving import ready_service


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


@pytest.fixture(scope="module")
def service(config: ServiceConfig, engine: RewardEngine) -> Iterator[ScoringService]:
    with ready_service(config, engine) as service:
        yield service


def app_with_keys(service: ScoringService, path: Path, **auth: Any) -> FastAPI:
    service.config = service.config.model_copy(update={"auth": Auth(keys=path, **auth)})
    return create_app(service.config, service)


def get(app: FastAPI, path: str, key: str | None = None, **headers: str) -> httpx.Response:
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(send())


def test_new_key_authenticates_and_only_its_hash_is_stored(path: Path) -> None:
    """The file holds the sha256 of the returned key and is readable by its owner only."""
    key, count = new_key(path, "trainer", weight=2.5)
    assert count == 1
    assert key not in path.read_text()
    assert hashlib.sha256(key.encode()).hexdigest() in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    found = Keyring(path).authenticate(key, "fold-3")
    assert found == Client("trainer", "fold-3", weight=2.5)
    assert Keyring(path).authenticate(key[:-1]) is None
    assert Keyring(path).authenticate("") is None


def test_two_keys_of_one_name_are_one_client(path: Path) -> None:
    """During a rotation the old and the new key authenticate the same client."""
    (old, _), (new, count) = new_key(path, "trainer"), new_key(path, "trainer")
    keyring = Keyring(path)
    assert count == 2
    assert keyring.authenticate(old) == keyring.authenticate(new) == Client("trainer")


def test_new_key_appends_after_a_missing_final_newline(path: Path) -> None:
    """An editor may leave out the last line end; the appended entry is still an entry of its own."""
    new_key(path, "a")
    path.write_text(path.read_text().rstrip("\n"))
    new_key(path, "b")
    assert [entry.name for entry in load_keys(path)] == ["a", "b"]


@pytest.mark.parametrize("text", ["", "# no keys yet\n", "---\n"])
def test_new_key_works_on_a_file_without_entries(path: Path, text: str) -> None:
    """An empty file, a comment and a document marker stay as they are before the first entry."""
    path.write_text(text)
    path.chmod(0o600)
    new_key(path, "a")
    assert path.read_text().startswith(text)
    assert [entry.name for entry in load_keys(path)] == ["a"]


@pytest.mark.parametrize("form", ["[{{name: a, sha256: {0}}}]", "  - name: a\n    sha256: {0}\n"])
def test_new_key_refuses_a_list_that_it_cannot_append_to(path: Path, form: str) -> None:
    """A list in brackets or an indented one is valid, but an appended entry would make it unreadable."""
    path.write_text(form.format("'" + "0" * 64 + "'"))
    path.chmod(0o600)
    before = path.read_text()
    with pytest.raises(ConfigError, match="in the first column"):
        new_key(path, "b")
    assert path.read_text() == before
    assert [entry.name for entry in load_keys(path)] == ["a"]


HASH = "0" * 64
BROKEN = {
    "empty": ("", "no keys"),
    "no keys": ("[]", "no keys"),
    "not YAML": ("- [", "not a YAML list"),
    "duplicate key": (f"- name: a\n  sha256: '{HASH}'\n  name: b", "line 3: the key 'name' is there twice"),
    "syntax error": ("- name: a\n  sha256: {rk_secret", r"not a YAML list of keys \(line 2\)"),
    "no hash": ("- name: a", "sha256"),
    "a key for a hash": ("- {name: a, sha256: rk_secret}", "sha256"),
    "unknown field": (f"- {{name: a, sha256: '{HASH}', wieght: 2}}", "wieght"),
    "no weight": (f"- {{name: a, sha256: '{HASH}', weight: 0}}", "weight"),
    "duplicate hash": (f"- {{name: a, sha256: '{HASH}'}}\n- {{name: b, sha256: '{HASH}'}}", "same sha256"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_load_keys_reports_a_broken_file_in_one_line(path: Path, name: str) -> None:
    """The error is one line that names the problem, and never repeats what stands in place of a hash."""
    text, expected = BROKEN[name]
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=expected) as error:
        load_keys(path)
    assert "\n" not in str(error.value)
    assert "rk_secret" not in str(error.value)


def test_load_keys_refuses_a_file_that_others_can_write(path: Path) -> None:
    """Any user who can append to the file could add a key of their own."""
    new_key(path, "a")
    path.chmod(0o620)
    with pytest.raises(ConfigError, match="writable by other users"):
        load_keys(path)


def test_reload_keeps_the_keys_if_the_file_is_broken(path: Path) -> None:
    """A broken or missing file changes nothing and is reported; a repaired one is used at once."""
    key, _ = new_key(path, "a")
    lines = list[str]()
    keyring = Keyring(path, lines.append)
    path.write_text("- nonsense")
    keyring.reload()
    path.unlink()
    keyring.reload()
    assert keyring.authenticate(key) is not None
    other, _ = new_key(path, "b")
    keyring.reload()
    assert keyring.authenticate(key) is None
    assert keyring.authenticate(other) == Client("b")
    assert [line.startswith("keeping the current keys") for line in lines] == [True, True, False]


def test_keyring_reloads_a_changed_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any signal a new key is valid at once, and a removed one for one more second."""
    key, _ = new_key(path, "a")
    lines, now = list[str](), [100.0]
    monkeypatch.setattr("reward_service.scoring.auth.time.monotonic", lambda: now[0])
    keyring = Keyring(path, lines.append)
    other, _ = new_key(path, "b")
    assert keyring.authenticate(other) == Client("b")
    assert keyring.authenticate(key) == Client("a")
    remove_keys(path, "a")
    now[0] += 1.0
    assert keyring.authenticate(key) is None
    assert len(lines) == 2


def test_keyring_reports_a_broken_change_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that became unusable does not fill the log."""
    key, _ = new_key(path, "a")
    lines, now = list[str](), [100.0]
    monkeypatch.setattr("reward_service.scoring.auth.time.monotonic", lambda: now[0])
    keyring = Keyring(path, lines.append)
    path.write_text("- nonsense")
    for _ in range(3):
        now[0] += 1
        assert keyring.authenticate(key) == Client("a")
    assert len(lines) == 1


def test_remove_keys_removes_all_keys_of_a_name(path: Path) -> None:
    """Other entries, every comment and the file's mode stay as they were."""
    keys = {name: new_key(path, name)[0] for name in ("a", "b", "c")}
    new_key(path, "b")
    path.write_text("# ours\n" + path.read_text().replace("- name: 'c'", "# of c\n\n- name: 'c'"))
    assert remove_keys(path, "b") == 2
    keyring = Keyring(path)
    assert [name for name, key in keys.items() if keyring.authenticate(key)] == ["a", "c"]
    assert [line for line in path.read_text().splitlines() if line.startswith("#")] == ["# ours", "# of c"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("name", "expected"),
    [("z", "no key is named 'z'; the file has a, b"), ("a", None)],
    ids=["unknown", "last"],
)
def test_remove_keys_refuses_an_unknown_and_the_last_name(
    path: Path, name: str, expected: str | None
) -> None:
    """The file stays as it was, and the error is one line."""
    new_key(path, "a")
    new_key(path, "b")
    if expected is None:
        remove_keys(path, "b")
        expected = "'a' has the only keys of the file"
    before = path.read_text()
    with pytest.raises(ConfigError, match=expected):
        remove_keys(path, name)
    assert path.read_text() == before


def test_changing_the_file_preserves_owner_mode_and_links(path: Path) -> None:
    """Users who could read the file still can; a symbolic link still points to it."""
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
    assert Keyring(path).authenticate(key) == Client("b")
    after = path.stat()
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)


def test_new_key_on_a_full_disk_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file stays as it was, and no temporary file is left beside it."""
    new_key(path, "a")
    before = path.read_text()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("reward_service.files.os.fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        new_key(path, "b")
    assert path.read_text() == before
    assert [found.name for found in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "form",
    [
        "[{{name: a, sha256: '{0}'}}, {{name: b, sha256: '{1}'}}]\n",
        "  - name: a\n    sha256: '{0}'\n  - name: b\n    sha256: '{1}'\n",
        "- {{name: a,\nsha256: '{0}'}}\n- {{name: b,\nsha256: '{1}'}}\n",
        "-\n  name: a\n  sha256: '{0}'\n-\n  name: b\n  sha256: '{1}'\n",
    ],
    ids=["in brackets", "indented", "lines that are not indented", "bare dashes"],
)
def test_remove_keys_refuses_entries_that_it_cannot_cut_out(path: Path, form: str) -> None:
    """Such a list has to be edited by hand; it stays as it is."""
    path.write_text(form.format("0" * 64, "1" * 64))
    path.chmod(0o600)
    before = path.read_text()
    with pytest.raises(ConfigError, match="edit the file by hand"):
        remove_keys(path, "a")
    assert path.read_text() == before


def test_concurrent_changes_lose_no_key(path: Path) -> None:
    """Commands that change the file at the same time wait for each other."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: new_key(path, f"k{number}"), range(24)))
        list(pool.map(lambda number: remove_keys(path, f"k{number}"), range(12)))
    assert sorted(entry.name for entry in load_keys(path)) == sorted(f"k{n}" for n in range(12, 24))


@pytest.mark.parametrize("route", ["/v1/evaluators", "/metrics"])
def test_protected_routes_require_a_key(service: ScoringService, path: Path, route: str) -> None:
    """A missing or wrong key or another scheme is a 401 with a challenge; a valid key is accepted."""
    key, _ = new_key(path, "a")
    app = app_with_keys(service, path)
    for response in (
        get(app, route),
        get(app, route, "rk_wrong"),
        get(app, route, ""),
        get(app, route, Authorization=f"Basic {key}"),
        get(app, route, Authorization=key),
    ):
        assert (response.status_code, response.json()["code"]) == (401, "unauthorized")
        assert response.headers["www-authenticate"].startswith("Bearer")
        assert key not in response.text
    assert get(app, route, key).status_code == 200
    assert get(app, route, Authorization=f"bearer {key}").status_code == 200


def test_public_routes_require_no_key(service: ScoringService, path: Path) -> None:
    """Health, documentation and the page are public; metrics are if the configuration says so."""
    new_key(path, "a")
    app = app_with_keys(service, path, open_metrics=True)
    routes = ("/health/live", "/health/ready", "/docs", "/openapi.json", "/", "/metrics")
    assert {route: get(app, route).status_code for route in routes} == dict.fromkeys(routes, 200)
    assert get(app, "/v1/evaluators").status_code == 401


def test_key_without_the_permission_is_forbidden(service: ScoringService, path: Path) -> None:
    """A known key that may not score is a 403, not a 401."""
    key, _ = new_key(path, "prometheus", may=["metrics"])
    app = app_with_keys(service, path)
    assert get(app, "/metrics", key).status_code == 200
    response = get(app, "/v1/evaluators", key)
    assert (response.status_code, response.json()["code"]) == (403, "forbidden")


def test_anonymous_access_still_refuses_a_wrong_key(service: ScoringService, path: Path) -> None:
    """If anonymous clients are allowed, a missing key is accepted and a wrong one still refused."""
    key, _ = new_key(path, "a")
    app = app_with_keys(service, path, allow_anonymous=True)
    codes = [get(app, "/v1/evaluators", given).status_code for given in (None, key, "rk_wrong")]
    assert codes == [200, 200, 401]


def test_keys_new_prints_only_the_key(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output is the key and nothing else, so that scripts can capture it."""
    with pytest.raises(SystemExit) as exit_info:
        main(["keys", "new", "trainer", "--weight", "3", "--file", str(path)])
    assert exit_info.value.code in (0, None)
    key = capsys.readouterr().out.strip()
    assert Keyring(path).authenticate(key) == Client("trainer", weight=3.0)


def test_keys_remove_reports_on_standard_error(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`keys remove NAME` reports what it removed; for an unknown name it exits with 2."""
    for name in ("a", "b"):
        new_key(path, name, may=["score"])
    for code, expected in ((0, "1 key of a removed"), (2, "no key is named 'a'")):
        with pytest.raises(SystemExit) as exit_info:
            main(["keys", "remove", "a", "--file", str(path)])
        assert (exit_info.value.code or 0) == code
        assert expected in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["a b"], ["a", "--weight", "0"], ["a", "--weight", "nan"], ["ä"]])
def test_keys_new_refuses_invalid_names_and_weights(path: Path, arguments: list[str]) -> None:
    """Values that could not be read back from the file are refused, and nothing is written."""
    with pytest.raises(SystemExit) as exit_info:
        main(["keys", "new", *arguments, "--file", str(path)])
    assert exit_info.value.code == 2
    assert not path.exists()


def test_keys_new_prints_the_path_as_it_was_given(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through a link: serving its target would miss that the link is set to another file."""
    new_key(path, "a")
    (folder := tmp_path / "a b #c").mkdir()
    (folder / "link.yaml").symlink_to(path)
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as exited:
        main(["keys", "new", "b", "--file", "link.yaml"])
    assert not exited.value.code
    option = shlex.quote(f"auth.keys={folder / 'link.yaml'}")
    assert f"serve with --set {option};" in capsys.readouterr().err
    assert load_config(overrides=[shlex.split(option)[0]]).auth.keys == folder / "link.yaml"


def test_keys_new_without_locks_names_the_file_system(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two commands at once would lose a key."""

    def flock(_descriptor: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(ConfigError, match=r"No locks available.*its file system has no locks"):
        new_key(path, "a")
    assert not path.exists()
