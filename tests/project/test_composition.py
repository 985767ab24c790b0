"""Guarantees of the Docker composition that can be checked without an engine."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml

from tests.support.service.fake_service import http_server

ROOT = Path(__file__).resolve().parents[2]
FILES = ("docker-compose.yml", "docker-compose.gpu.yml")
SERVICES = yaml.safe_load((ROOT / FILES[0]).read_text())["services"]
DOCKERFILE = (ROOT / "Dockerfile.reward").read_text()
OURS = ("setup", "reward", "trainer", "worker")
# docker-compose.gpu.yml takes another configuration, as documented in .env.example.
ELSEWHERE = {("CONFIG", "configs/karlo.yaml")}


def variables() -> set[tuple[str, str]]:
    """Return name and default of every environment variable in the files."""
    text = "".join((ROOT / name).read_text() for name in FILES)
    return set(re.findall(r"\$\{(\w+):-([^}]*)\}", text)) - ELSEWHERE


def test_env_example_lists_every_variable_with_its_default():
    """All variables and no others; every line is a comment, so that copying the file changes nothing."""
    lines = (ROOT / ".env.example").read_text().splitlines()
    assert {tuple(line[1:].split("=", 1)) for line in lines if re.match(r"#[A-Z_]+=", line)} == variables()
    assert all(line.startswith("#") or not line for line in lines)


def test_every_variable_has_a_default():
    """`up` works without a file .env and without warnings."""
    text = "".join((ROOT / name).read_text() for name in FILES)
    assert re.findall(r"(?<!\$)\$\{\w+\}|(?<!\$)\$[A-Za-z]", text) == []


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_unprivileged(name):
    """Third-party services too: not root, a read-only file system, no capability."""
    service = SERVICES[name]
    assert service["user"].partition(":")[0] not in ("", "0", "root")
    assert service["read_only"] is True
    assert "cap_add" not in service
    assert "privileged" not in service
    if name != "setup":  # its one program has a file capability
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


@pytest.mark.parametrize("name", SERVICES)
def test_published_ports_are_on_loopback(name):
    """Other addresses need an explicit setting."""
    for port in SERVICES[name].get("ports", ()):
        assert port.startswith(("127.0.0.1:", "${REWARD_BIND:-127.0.0.1}:"))


def test_reward_service_stop_grace_period_exceeds_its_drain_time():
    """20 s for admitted requests and 6 s for the rest, as in docs/operations.md."""
    assert int(SERVICES["reward"]["stop_grace_period"].removesuffix("s")) > 26


@pytest.mark.parametrize("name", ["reward", "prometheus", "grafana", "postgres"])
def test_servers_are_restarted(name):
    """After a crash, and when the machine starts."""
    assert SERVICES[name]["restart"] == "unless-stopped"


def test_third_party_services_need_a_profile():
    """Without a profile, only our own services start."""
    assert {name for name, service in SERVICES.items() if not service.get("profiles")} == {
        "setup", "reward", "trainer",
    }  # fmt: skip
    assert {name for name in SERVICES if SERVICES[name]["image"].startswith("karlo-reward-lab/")} == set(OURS)


def test_containers_reach_each_other_without_a_proxy():
    """Docker gives every container the proxies of its client's configuration, in both cases."""
    for name in ("trainer", "worker", "grafana"):
        environment = SERVICES[name]["environment"]
        assert environment["NO_PROXY"] == environment["no_proxy"]
        assert {"reward", "prometheus", "127.0.0.1"} <= set(environment["NO_PROXY"].split(","))


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_health_check_uses_no_proxy(status, code):
    """The command of the image, with a proxy in its environment that does not exist."""
    check = re.search(r"HEALTHCHECK [^\n]*8s.*?CMD (\[.*?\])\n", DOCKERFILE, re.DOTALL)
    words = json.loads(check[1].replace("\\\n", ""))
    with http_server(lambda _: httpx.Response(status, json={"status": "ready"})) as url:
        command = [sys.executable, *words[1:-1], words[-1].replace("http://127.0.0.1:8000", url)]
        proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
        done = subprocess.run(command, env={**os.environ, **proxies}, capture_output=True, check=False)
    assert done.returncode == code, done.stderr.decode()
