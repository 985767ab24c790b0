"""What the application has for Ray Serve, without a cluster."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from starlette.requests import Request
from starlette.responses import Response

from reward_service.config import Limits, ServiceConfig, load_config
from reward_service.observability.metrics import Metrics
from reward_service.ray_app import Door, merged
from reward_service.scheduler.autoscaling import PAIRS, PairsPerReplica
from reward_service.settings import DEFAULT_CONFIG
from tests.support.service.checkpoints import Checkpoints

REPOSITORY = Path(__file__).resolve().parents[3]


@dataclass
class Scaling:
    """Ray's context, as far as it is used."""

    under_way: dict[str, float] | None
    target_num_replicas: int = 3
    aggregated_metrics: Any = field(init=False)

    def __post_init__(self) -> None:
        self.aggregated_metrics = None if self.under_way is None else {PAIRS: self.under_way}


@pytest.mark.parametrize(
    ("under_way", "wanted"),
    [
        (None, 3),
        ({}, 3),
        ({"a": 0.0, "b": 0.0}, 0),
        ({"a": 1.0}, 1),
        ({"a": 100.0}, 1),
        ({"a": 100.0, "b": 0.5}, 2),
        ({"a": 1000.0, "b": 1.0}, 11),
    ],
)
def test_replicas_are_as_many_as_the_pairs_need(under_way: dict[str, float] | None, wanted: int) -> None:
    """All pairs under way, over what each replica should have; no report changes nothing."""
    assert PairsPerReplica(100)(Scaling(under_way)) == (wanted, {})


@pytest.mark.parametrize("target", [0, -1, float("nan"), float("inf")])
def test_a_target_is_a_positive_number(target: float) -> None:
    """Anything else would scale by nonsense."""
    with pytest.raises(ValueError, match="target_pairs must be a positive number"):
        PairsPerReplica(target)


def test_pages_of_metrics_are_merged() -> None:
    """One page in Prometheus' form: each family once, each sample with its replica, nothing added up."""
    first, second = Metrics(), Metrics()
    first.pairs.inc(5)
    second.pairs.inc(7)
    first.fill.observe(0.5)
    first.on_answer('odd "route"\n', 200)
    page = merged({"a": first.render(), "b": second.render()}).decode()
    assert page.count("# TYPE reward_pairs_total counter") == 1
    assert 'reward_pairs_total{replica="a"} 5.0' in page
    assert 'reward_pairs_total{replica="b"} 7.0' in page
    assert 'reward_batch_fill_bucket{le="0.5",replica="a"} 1.0' in page
    assert 'reward_batch_fill_count{replica="b"} 0.0' in page
    alone = first.render()  # once: the process's own seconds go on
    once = merged({"a": alone})
    assert once.decode().replace('{replica="a"}', "").replace(',replica="a"', "").splitlines() == (
        alone.decode().splitlines()
    )


def scope(host: str = "127.0.0.1", **headers: str) -> dict[str, Any]:
    listed = [(name.encode(), value.encode()) for name, value in headers.items()]
    path = {"path": "/score", "raw_path": b"/score", "query_string": b"", "root_path": ""}
    return {"type": "http", "method": "POST", "headers": listed, "server": (host, 8000), **path}


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the id that it was given."""
    given = Request(scope).headers.get("x-request-id", "none")
    await Response("scores", headers={"X-Request-Id": given.replace(" ", "")})(scope, receive, send)


async def never() -> Any:
    await asyncio.Event().wait()


def asked(asked_scope: dict[str, Any], *, loopback_only: bool, direct: bool = False) -> list[dict[str, Any]]:
    """The messages that a request is answered with."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Door(app, loopback_only=loopback_only, direct=direct)(asked_scope, never, send))
    return sent


@pytest.mark.parametrize(
    ("host", "loopback_only", "status"),
    [
        ("127.0.0.1", True, 200),
        ("::1", True, 200),
        ("10.0.0.7", True, 403),
        ("example", True, 403),
        ("10.0.0.7", False, 200),
    ],
)
def test_without_keys_it_answers_on_loopback_only(host: str, loopback_only: bool, status: int) -> None:
    """Ray's proxy may listen anywhere, whatever the service's configuration says."""
    start, body = asked(scope(host), loopback_only=loopback_only)
    assert start["status"] == status
    assert (b"auth.keys" in body["body"]) == (status == 403)
    assert (b"scores" in body["body"]) == (status == 200)


@pytest.mark.parametrize(("loopback_only", "status"), [(True, 403), (False, 200)])
def test_behind_haproxy_it_needs_keys_everywhere(loopback_only: bool, status: int) -> None:
    """HAProxy listens on all interfaces and comes by loopback, whoever asks."""
    start, _ = asked(scope("127.0.0.1"), loopback_only=loopback_only, direct=True)
    assert start["status"] == status


@pytest.mark.parametrize(("given", "left"), [("run-7", []), ("a b", [b"ab"])])
def test_the_request_id_is_not_told_twice(given: str, left: list[bytes]) -> None:
    """Ray's proxy puts the request's on the answer; ours stays where it is another."""
    start, _ = asked(scope(**{"x-request-id": given}), loopback_only=True)
    assert [value for name, value in start["headers"] if name == b"x-request-id"] == left


def test_who_is_cancelled_has_left() -> None:
    """The application sees the disconnection that ASGI has for it, and may end in order."""
    seen: list[Any] = []
    begun = asyncio.Event()

    async def waiting(_: Any, receive: Any, send: Any) -> None:
        begun.set()
        seen.append((await receive())["type"])
        await asyncio.sleep(0.01)
        await send({"type": "http.response.start", "status": 499, "headers": []})
        seen.append("ended")

    async def run() -> None:
        sent: list[Any] = []
        serving = asyncio.ensure_future(Door(waiting, loopback_only=True)(scope(), never, sent.append))
        await begun.wait()
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
        assert sent == []

    asyncio.run(run())
    assert seen == ["http.disconnect", "ended"]


@pytest.fixture
def ray_app() -> Any:
    return pytest.importorskip("reward_service.ray_app", reason="Ray is not installed: the extra `ray`")


def test_rays_bounds_stand_above_ours(ray_app: Any, config: ServiceConfig) -> None:
    """Requests, drain and resources follow the configuration."""
    limits = Limits(max_queued_pairs=1000, max_connections=50)
    options = ray_app.deployment(
        config.model_copy(update={"limits": limits, "drain_s": 33.0, "threads": 3, "device": "cuda:0"})
    )
    assert options["max_ongoing_requests"] > 1000
    assert options["max_queued_requests"] == 50
    assert options["graceful_shutdown_timeout_s"] > 33.0
    assert options["ray_actor_options"] == {"num_cpus": 3, "num_gpus": 1}
    assert ray_app.deployment(config)["ray_actor_options"]["num_gpus"] == 0


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"config": "/no/such.yaml"}, r"/no/such\.yaml: no such configuration file"),
        ({"set": ["colour=red"]}, "service.colour: unknown key"),
        ({"set": "threads=none"}, "service.threads"),
        ({"configuration": "x"}, "args: configuration: .*known here: config, set"),
        ({"set": ["auth.keys=/no/keys.yaml"]}, r"/no/keys\.yaml: cannot be read"),
        ({"set": ["calibration=/no/table.json"]}, r"/no/table\.json"),
    ],
)
def test_what_cannot_be_served_is_told_in_a_line(
    ray_app: Any, arguments: dict[str, Any], problem: str
) -> None:
    """Before anything is started, as an error that Ray shows without a traceback."""
    from ray.serve.exceptions import RayServeException

    with pytest.raises(RayServeException, match=problem) as error:
        ray_app.app(arguments)
    assert "\n" not in str(error.value)


def test_the_command_line_of_ray_says_it_in_a_line(ray_app: Any, tmp_path: Path) -> None:
    """`serve run` with a missing file: one line and exit code 2."""
    command = [str(Path(sys.executable).with_name("serve")), "run", "reward_service.ray_app:app"]
    found = subprocess.run(
        [*command, f"config={tmp_path}/none.yaml"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"},
    )
    assert found.returncode == 2
    assert "Traceback" not in found.stderr
    assert found.stderr.strip().splitlines()[-1].startswith(f"Error: {tmp_path}/none.yaml: no such")


def test_relative_paths_begin_here_or_at_the_configurations(
    ray_app: Any, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file of the folder that `serve` runs in, else one of those that come with the code."""
    monkeypatch.chdir(checkpoints.folder)
    assert ray_app._arguments({"config": "config.yaml"}).config == checkpoints.config
    assert ray_app._arguments({"config": "configs/miniature.yaml"}).config == DEFAULT_CONFIG
    assert ray_app._arguments({}).config == DEFAULT_CONFIG


def test_rays_configuration_fits_its_schema(ray_app: Any) -> None:
    """configs/ray.yaml, as it is and with autoscaling instead of a number."""
    from ray.serve.schema import ServeDeploySchema

    text = (REPOSITORY / "configs" / "ray.yaml").read_text()
    fixed = yaml.safe_load(text)
    before, comment, after = text.partition("        # By the pairs that wait, instead of num_replicas:\n")
    assert comment
    scaled = yaml.safe_load(
        before.replace("        num_replicas: 1\n", "") + after.replace("        # ", "        ")
    )
    for found in (fixed, scaled):
        schema = ServeDeploySchema.model_validate(found)
        application = schema.applications[0]
        assert application.import_path == "reward_service.ray_app:app"
        assert application.deployments[0].name == ray_app.NAME
        assert schema.http_options.host == "127.0.0.1"
        given = ray_app._arguments(application.args)
        assert load_config(given.config, given.set).threads == 1
    assert schema.applications[0].deployments[0].autoscaling_config["max_replicas"] == 4


def test_the_page_shows_what_ray_takes(ray_app: Any) -> None:
    """docs/ray.md: the resource for Kubernetes is YAML, and what it has for Ray fits Ray's schema."""
    from ray.serve.schema import ServeDeploySchema

    text = (REPOSITORY / "docs" / "ray.md").read_text()
    blocks = [block.partition("```")[0] for block in text.split("```yaml\n")[1:]]
    service, policy = yaml.safe_load_all(blocks[-1])
    schema = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    reward_client = schema.applications[0].deployments[0]
    assert reward_client.name == ray_app.NAME
    assert reward_client.autoscaling_config["policy"]["policy_function"].endswith(":PairsPerReplica")
    assert set(schema.applications[0].args) <= set(ray_app.Arguments.model_fields)
    assert service["spec"]["rayClusterConfig"]["rayVersion"] == importlib.metadata.version("ray")
    assert policy["kind"] == "NetworkPolicy"
    [described] = yaml.safe_load(blocks[1])
    assert described["autoscaling_config"]["max_replicas"] == 4


def test_a_judge_that_failed_is_unhealthy(ray_app: Any, config: ServiceConfig) -> None:
    """Ray is told why, in a line, and replaces it; before, it hears nothing."""
    from reward_service.scoring.service import ScoringService

    replica = object.__new__(ray_app.Replica)
    replica._closing, replica._judge = ray_app.ExitStack(), ScoringService(config)
    asyncio.run(replica.check_health())
    replica._judge.fail("the device has failed")
    with pytest.raises(RuntimeError, match=r"^the device has failed$"):
        asyncio.run(replica.check_health())
    replica._judge.close()
