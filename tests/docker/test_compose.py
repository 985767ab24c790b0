"""Compose project: training to a LoRA on the host, API keys, privileges, restarts, upgrades, images."""

import base64
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import docker
import httpx
import pytest
from docker.models.containers import Container
from PIL import Image

from reward_service.client import RewardClient
from tests.docker.composing import BASE_IMAGE, Composition
from tests.docker.conftest import composition_of

UID, GID = 12345, 12346  # neither root, nor the images' own user, nor a user of the host
SERVICES = ("setup", "reward", "trainer")

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(2400)]


class Done(NamedTuple):
    """Result of `up --exit-code-from trainer`."""

    exit_code: int
    output: str
    composition: Composition
    containers: dict[str, Container]


@pytest.fixture(scope="module")
def done(images: None, engine: docker.DockerClient, tmp_path_factory) -> Iterator[Done]:
    """Run the composition to the end with a short training, for a folder that does not exist yet."""
    composition = composition_of(
        tmp_path_factory.mktemp("compose") / "not" / "there",
        "compose",
        RUN_UID=str(UID),
        RUN_GID=str(GID),
        TRAINER_ARGS="--set iterations=2 --set prompts.validation_limit=4",
    )
    try:
        up = composition("up", "--exit-code-from", "trainer")
        yield Done(up.returncode, up.stdout, composition, composition.containers(engine))
    finally:
        composition.down()


@pytest.fixture(scope="module")
def served(done: Done) -> Composition:
    """Start the reward service of the same composition again."""
    up = done.composition("up", "-d", "reward")
    assert up.returncode == 0, up.stdout
    with RewardClient(done.composition.url) as client:
        client.wait_until_ready(timeout_s=120)
    return done.composition


def test_training_ends_with_exit_code_0(done):
    """`docker-compose up --exit-code-from trainer` returns the trainer's own exit code."""
    assert done.exit_code == 0, done.output[-6000:]


def test_lora_images_and_report_are_on_the_host(done):
    """The results outlive the container, as files of the configured user."""
    runs = done.composition.runs
    found = [
        next(iter(runs.glob(f"compose/{name}")), None)
        for name in ("lora/*.safetensors", "*.png", "report.html")
    ]
    assert None not in found
    assert {(path.stat().st_uid, path.stat().st_gid) for path in found} == {(UID, GID)}


@pytest.mark.parametrize("service", SERVICES)
def test_container_has_no_privileges(done, service):
    """No root, a read-only file system, no capabilities beyond those of setup."""
    attributes = done.containers[service].attrs
    host = attributes["HostConfig"]
    assert attributes["Config"]["User"] == f"{UID}:{GID}"
    assert host["ReadonlyRootfs"]
    assert not host["CapAdd"]
    assert not host["Privileged"]
    assert host["Init"]
    allowed = {"CHOWN"} if service == "setup" else set()
    assert host["CapDrop"] == ["ALL"] or allowed == DEFAULT_CAPABILITIES - set(host["CapDrop"])
    assert allowed or "no-new-privileges:true" in host["SecurityOpt"]


#: Docker's default capabilities of a container.
DEFAULT_CAPABILITIES = {
    "AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE",
    "NET_RAW", "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT",
}  # fmt: skip


def test_inspect_and_history_show_no_keys(done):
    """Keys are in a volume, not in the output of `docker inspect` or `docker history`."""
    for container in done.containers.values():
        assert "rk_" not in str(container.attrs)
        assert "rk_" not in str(container.image.history())


def test_service_is_published_on_loopback_only(done):
    """The port is open to this machine only."""
    bindings = done.containers["reward"].attrs["HostConfig"]["PortBindings"]
    assert {b["HostIp"] for ports in bindings.values() for b in ports} == {"127.0.0.1"}


@pytest.mark.parametrize("route", ["/v1/evaluators", "/metrics"])
def test_requests_without_a_key_are_rejected(served, route):
    """Every route of the published port needs a key."""
    assert httpx.get(served.url + route).status_code == 401
    assert httpx.post(served.url + "/score", json={}).status_code == 401


def test_host_can_request_scores(served):
    """A new key is valid at once, and the light client gets four scores."""
    with RewardClient(served.url, api_key=served.key("host")) as client:
        response = client.score(["a red circle"], [Image.new("RGB", (48, 40), "red")])
    assert set(response.results[0].scores) == {"aesthetic", "clip", "pickscore", "hpsv2"}


def test_another_container_can_request_scores(served, engine):
    """With curl, the network, the service's name and a key."""
    image = {"format": "raw", "shape": [8, 8, 3], "data": base64.b64encode(bytes(8 * 8 * 3)).decode()}
    body = json.dumps({"items": [{"prompt": "a black square", "image": image}]})
    curl = "command -v curl || { apt-get update && apt-get install -y curl; }"
    headers = '-H "Authorization: Bearer $KEY" -H "Content-Type: application/json"'
    # The engine drops a last line without a line end.
    request = f'curl -sS http://reward:8000/score {headers} --data "$BODY"'
    output = engine.containers.run(
        BASE_IMAGE,
        ["sh", "-c", f"{{ {curl}; }} >/dev/null 2>&1; {request} 2>&1; echo"],
        network=served.network,
        environment={"KEY": served.key("neighbour"), "BODY": body},
        remove=True,
    )
    assert b'"reward":' in output, output


def test_prometheus_key_reads_metrics_only(served):
    """The key that another container's user can read gives no access to scores."""
    key = served("exec", "-T", "setup", "cat", "/keys/prometheus").stdout.strip().splitlines()[-1]
    headers = {"Authorization": f"Bearer {key}"}
    codes = [
        httpx.get(served.url + route, headers=headers).status_code for route in ("/metrics", "/v1/evaluators")
    ]
    assert codes == [200, 403]


def test_crashed_service_is_restarted(served, engine):
    """The engine starts it again, and the same keys are valid."""
    service = served.containers(engine)["reward"]
    key = served.key("patient")
    assert service.exec_run(["sh", "-c", "kill -9 $(cat /proc/1/task/1/children)"]).exit_code == 0
    deadline = time.monotonic() + 300
    while service.attrs["RestartCount"] == 0:
        assert time.monotonic() < deadline, "it was not started again"
        time.sleep(0.2)
        service.reload()
    with RewardClient(served.url, api_key=key) as client:
        client.wait_until_ready(timeout_s=120)
        assert client.score(["a red circle"], [Image.new("RGB", (48, 40), "red")]).results[0].scores


def test_upgrade_loses_no_request(served, engine):
    """The container is replaced under load: clients with a retry budget see a pause only."""
    key, old = served.key("busy"), served.containers(engine)["reward"].id
    image = Image.new("RGB", (48, 40), "red")
    stop = threading.Event()

    def request(seed: int) -> list[float]:
        rewards = []
        with RewardClient(served.url, api_key=key, client_id=f"c{seed}", retry_budget_s=120) as client:
            while not stop.is_set():
                response = client.score(["a red circle"] * 8, [image] * 8, deterministic=True)
                rewards += [result.reward for result in response.results]
        return rewards

    with ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(request, seed) for seed in range(3)]
        time.sleep(2)
        up = served("up", "-d", "--force-recreate", "--no-deps", "reward")
        new = served.containers(engine)["reward"]
        with RewardClient(served.url) as client:
            client.wait_until_ready(timeout_s=120)
        time.sleep(2)
        stop.set()
        rewards = [reward for one in clients for reward in one.result(timeout=150)]
    assert up.returncode == 0, up.stdout
    assert new.id != old
    assert len(rewards) > 100
    assert set(rewards) == {rewards[0]}


@pytest.mark.parametrize("service", SERVICES)
def test_image_contains_no_build_tools_and_no_caches(done, engine, service):
    """Compilers, static libraries and package caches are not left in an image."""
    script = (
        "for tool in cc gcc g++ make cmake git nvcc; do command -v $tool; done; "
        "ls -d /root/.cache /tmp/* /var/cache/pip; "
        "find / -xdev -name '*.a'; find / -xdev -name '*.whl' -size +2M"
    )
    output = engine.containers.run(
        f"karlo-reward-lab/{service}",
        ["-c", f"({script}) 2>/dev/null; true"],
        entrypoint="sh",
        user="0",
        remove=True,
    )
    assert output.decode().split() == []


def test_only_the_setup_image_can_change_owners(done, engine):
    """No other image has a program with a capability or with another user's rights."""
    script = (
        "import os, stat\n"
        "for folder, _, names in os.walk('/'):\n"
        "    if folder.startswith(('/proc', '/sys')): continue\n"
        "    for path in (os.path.join(folder, name) for name in names):\n"
        "        if os.path.isfile(path) and not os.path.islink(path):\n"
        "            if 'security.capability' in os.listxattr(path): print(path)\n"
    )
    found = {
        service: engine.containers.run(
            f"karlo-reward-lab/{service}", ["-c", script], entrypoint="python", user="0", remove=True
        ).decode()
        for service in SERVICES
    }
    assert found == {"setup": "/usr/local/bin/hand-over\n", "reward": "", "trainer": ""}
