"""Guarantees of the Docker composition that can be checked without an engine."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FILES = ("docker-compose.yml", "docker-compose.gpu.yml")
SERVICES = yaml.safe_load((ROOT / FILES[0]).read_text())["services"]
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
