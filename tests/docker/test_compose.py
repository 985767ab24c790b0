"""The composition serves the miniature to those with a key and leaves a trained LoRA on the host."""

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

UID, GID = 12345, 12346  # neither root, nor the images' own user, nor anybody on the host
SERVICES = ("setup", "reward", "trainer")

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(2400)]


class Done(NamedTuple):
    """What one `up --exit-code-from trainer` left."""

    exit_code: int
    output: str
    composition: Composition
    containers: dict[str, Container]


@pytest.fixture(scope="module")
def done(images: None, engine: docker.DockerClient, tmp_path_factory) -> Iterator[Done]:
    """Run the composition to the end with a short training, for a folder that is not there yet."""
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
    """The same composition with the service up again."""
    up = done.composition("up", "-d", "reward")
    assert up.returncode == 0, up.stdout
    with RewardClient(done.composition.url) as client:
        client.wait_until_ready(timeout_s=120)
    return done.composition


def test_the_training_ends_well(done):
    """`docker-compose up --exit-code-from trainer` answers with the trainer's own exit code, 0."""
    assert done.exit_code == 0, done.output[-6000:]


def test_lora_images_and_report_lie_on_the_host(done):
    """What was trained in a container outlives it, as files of the user who asked."""
    runs = done.composition.runs
    found = [
        next(iter(runs.glob(f"compose/{name}")), None)
        for name in ("lora/*.safetensors", "*.png", "report.html")
    ]
    assert None not in found
    assert {(path.stat().st_uid, path.stat().st_gid) for path in found} == {(UID, GID)}


@pytest.mark.parametrize("service", SERVICES)
def test_a_container_is_locked(done, service):
    """A hole in a program of ours opens no root shell, no file system and no capability."""
    found = done.containers[service].attrs
    host = found["HostConfig"]
    assert found["Config"]["User"] == f"{UID}:{GID}"
    assert host["ReadonlyRootfs"]
    assert not host["CapAdd"]
    assert not host["Privileged"]
    assert host["Init"]
    left = {"CHOWN"} if service == "setup" else set()
    assert host["CapDrop"] == ["ALL"] or left == DEFAULT_CAPABILITIES - set(host["CapDrop"])
    assert left or "no-new-privileges:true" in host["SecurityOpt"]


#: What Docker gives a container that asks for nothing.
DEFAULT_CAPABILITIES = {
    "AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE",
    "NET_RAW", "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT",
}  # fmt: skip


def test_no_secret_stands_where_others_look(done):
    """Keys are in a volume, not in what `docker inspect` or `docker history` show."""
    for container in done.containers.values():
        assert "rk_" not in str(container.attrs)
        assert "rk_" not in str(container.image.history())


def test_the_judge_is_published_on_loopback_only(done):
    """The port answers this machine and nobody else."""
    bindings = done.containers["reward"].attrs["HostConfig"]["PortBindings"]
    assert {b["HostIp"] for ports in bindings.values() for b in ports} == {"127.0.0.1"}


@pytest.mark.parametrize("route", ["/v1/evaluators", "/metrics"])
def test_without_a_key_there_is_no_answer(served, route):
    """The published port tells nobody anything without a key."""
    assert httpx.get(served.url + route).status_code == 401
    assert httpx.post(served.url + "/score", json={}).status_code == 401


def test_the_host_can_ask_the_judge(served):
    """A new key counts at once, and the light client gets four scores."""
    with RewardClient(served.url, api_key=served.key("host")) as client:
        answer = client.score(["a red circle"], [Image.new("RGB", (48, 40), "red")])
    assert set(answer.results[0].scores) == {"aesthetic", "clip", "pickscore", "hpsv2"}


def test_another_container_can_ask_the_judge(served, engine):
    """Curl, from a container that knows nothing but the network, the service's name and a key."""
    image = {"format": "raw", "shape": [8, 8, 3], "data": base64.b64encode(bytes(8 * 8 * 3)).decode()}
    body = json.dumps({"items": [{"prompt": "a black square", "image": image}]})
    curl = "command -v curl || { apt-get update && apt-get install -y curl; }"
    headers = '-H "Authorization: Bearer $KEY" -H "Content-Type: application/json"'
    # The engine forgets a last line without an end.
    ask = f'curl -sS http://reward:8000/score {headers} --data "$BODY"'
    said = engine.containers.run(
        BASE_IMAGE,
        ["sh", "-c", f"{{ {curl}; }} >/dev/null 2>&1; {ask} 2>&1; echo"],
        network=served.network,
        environment={"KEY": served.key("neighbour"), "BODY": body},
        remove=True,
    )
    assert b'"reward":' in said, said


def test_prometheus_key_reads_metrics_and_nothing_else(served):
    """The key that is readable for another container's user cannot score."""
    found = served("exec", "-T", "setup", "cat", "/keys/prometheus").stdout.strip().splitlines()[-1]
    headers = {"Authorization": f"Bearer {found}"}
    codes = [
        httpx.get(served.url + route, headers=headers).status_code for route in ("/metrics", "/v1/evaluators")
    ]
    assert codes == [200, 403]


def test_a_judge_that_dies_comes_back(served, engine):
    """The engine starts it again after a crash, and the same keys count."""
    service = served.containers(engine)["reward"]
    key = served.key("patient")
    assert service.exec_run(["sh", "-c", "kill -9 $(cat /proc/1/task/1/children)"]).exit_code == 0
    deadline = time.monotonic() + 60
    while service.attrs["RestartCount"] == 0:
        assert time.monotonic() < deadline, "it was not started again"
        time.sleep(0.2)
        service.reload()
    with RewardClient(served.url, api_key=key) as client:
        client.wait_until_ready(timeout_s=120)
        assert client.score(["a red circle"], [Image.new("RGB", (48, 40), "red")]).results[0].scores


def test_an_upgrade_loses_no_request(served, engine):
    """Another container in place of the service's, under load: callers with a retry budget notice a pause."""
    key, old = served.key("busy"), served.containers(engine)["reward"].id
    image = Image.new("RGB", (48, 40), "red")
    over = threading.Event()

    def ask(seed: int) -> list[float]:
        rewards = []
        with RewardClient(served.url, api_key=key, client_id=f"c{seed}", retry_budget_s=120) as client:
            while not over.is_set():
                answer = client.score(["a red circle"] * 8, [image] * 8, deterministic=True)
                rewards += [result.reward for result in answer.results]
        return rewards

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask, seed) for seed in range(3)]
        time.sleep(2)
        up = served("up", "-d", "--force-recreate", "--no-deps", "reward")
        new = served.containers(engine)["reward"]
        with RewardClient(served.url) as client:
            client.wait_until_ready(timeout_s=120)
        time.sleep(2)
        over.set()
        rewards = [reward for one in asking for reward in one.result(timeout=150)]
    assert up.returncode == 0, up.stdout
    assert new.id != old
    assert len(rewards) > 100
    assert set(rewards) == {rewards[0]}


@pytest.mark.parametrize("service", SERVICES)
def test_an_image_holds_no_tools_to_build_and_no_caches(done, engine, service):
    """What installing and compiling needs is not left behind."""
    look = (
        "for tool in cc gcc g++ make cmake git nvcc; do command -v $tool; done; "
        "ls -d /root/.cache /tmp/* /var/cache/pip; "
        "find / -xdev -name '*.a'; find / -xdev -name '*.whl' -size +2M"
    )
    said = engine.containers.run(
        f"karlo-reward-lab/{service}",
        ["-c", f"({look}) 2>/dev/null; true"],
        entrypoint="sh",
        user="0",
        remove=True,
    )
    assert said.decode().split() == []


def test_changing_owners_is_for_the_first_step_alone(done, engine):
    """No image but setup's has a program with a capability or with another user's rights."""
    look = (
        "import os, stat\n"
        "for folder, _, names in os.walk('/'):\n"
        "    if folder.startswith(('/proc', '/sys')): continue\n"
        "    for path in (os.path.join(folder, name) for name in names):\n"
        "        if os.path.isfile(path) and not os.path.islink(path):\n"
        "            if 'security.capability' in os.listxattr(path): print(path)\n"
    )
    found = {
        service: engine.containers.run(
            f"karlo-reward-lab/{service}", ["-c", look], entrypoint="python", user="0", remove=True
        ).decode()
        for service in SERVICES
    }
    assert found == {"setup": "/usr/local/bin/hand-over\n", "reward": "", "trainer": ""}
