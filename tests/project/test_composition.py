"""The composition keeps the promises that need no engine to check."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FILES = ("docker-compose.yml", "docker-compose.gpu.yml")
SERVICES = yaml.safe_load((ROOT / FILES[0]).read_text())["services"]
OURS = ("setup", "reward", "trainer", "worker")
# docker-compose.gpu.yml takes another configuration, as .env.example says.
ELSEWHERE = {("CONFIG", "configs/karlo.yaml")}


def variables() -> set[tuple[str, str]]:
    """Name and default of everything that the files take from the environment."""
    text = "".join((ROOT / name).read_text() for name in FILES)
    return set(re.findall(r"\$\{(\w+):-([^}]*)\}", text)) - ELSEWHERE


def test_the_example_lists_every_setting_with_its_default():
    """What can be set is in .env.example, and nothing else is; an uncommented line changes nothing."""
    lines = (ROOT / ".env.example").read_text().splitlines()
    assert {tuple(line[1:].split("=", 1)) for line in lines if re.match(r"#[A-Z_]+=", line)} == variables()
    assert all(line.startswith("#") or not line for line in lines)


def test_every_variable_has_a_default():
    """`up` works without a file .env and without warnings."""
    text = "".join((ROOT / name).read_text() for name in FILES)
    assert re.findall(r"(?<!\$)\$\{\w+\}|(?<!\$)\$[A-Za-z]", text) == []


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_locked(name):
    """Those of others too: not root, a read-only file system, no capability."""
    service = SERVICES[name]
    assert service["user"].partition(":")[0] not in ("", "0", "root")
    assert service["read_only"] is True
    assert "cap_add" not in service
    assert "privileged" not in service
    if name != "setup":  # whose one program has a capability of its file
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_published_is_on_loopback(name):
    """Whoever wants more says so."""
    for port in SERVICES[name].get("ports", ()):
        assert port.startswith(("127.0.0.1:", "${REWARD_BIND:-127.0.0.1}:"))


def test_the_judge_has_longer_to_end_than_it_takes_to_drain():
    """20 s for what was admitted and 6 s for the rest, by docs/operations.md."""
    assert int(SERVICES["reward"]["stop_grace_period"].removesuffix("s")) > 26


@pytest.mark.parametrize("name", ["reward", "prometheus", "grafana", "postgres"])
def test_what_serves_is_restarted(name):
    """After a fault, and with the machine."""
    assert SERVICES[name]["restart"] == "unless-stopped"


def test_only_what_is_asked_for_starts():
    """The images of others belong to profiles."""
    assert {name for name, service in SERVICES.items() if not service.get("profiles")} == {
        "setup", "reward", "trainer",
    }  # fmt: skip
    assert {name for name in SERVICES if SERVICES[name]["image"].startswith("karlo-reward-lab/")} == set(OURS)
