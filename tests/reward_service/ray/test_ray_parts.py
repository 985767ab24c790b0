"""Ray Serve application without a cluster: arguments, options, middleware, health and merged metrics."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from starlette.requests import Request
from starlette.responses import Response

from reward_service.config import Limits, ServiceConfig, load_config
from reward_service.observability.metrics import Metrics
from reward_service.settings import DEFAULT_CONFIG
from tests.support.service.checkpoints import Checkpoints

ray_app = pytest.importorskip("reward_service.ray_app", reason="Ray is not installed: the extra `ray`")

REPOSITORY = Path(__file__).resolve().parents[3]


def test_metrics_pages_are_merged() -> None:
    """The merged page has each family once and each sample with its replica; nothing is summed."""
    first, second = Metrics(), Metrics()
    first.pairs.inc(5)
    second.pairs.inc(7)
    first.fill.observe(0.5)
    first.on_response('odd "route"\n', 200)
    page = ray_app.merge_pages({"a": first.render(), "b": second.render()}).decode()
    assert page.count("# TYPE reward_pairs_total counter") == 1
    assert 'reward_pairs_total{replica="a"} 5.0' in page
    assert 'reward_pairs_total{replica="b"} 7.0' in page
    assert 'reward_batch_fill_bucket{le="0.5",replica="a"} 1.0' in page
    assert 'reward_batch_fill_count{replica="b"} 0.0' in page
    single = first.render()  # rendered once: the process metrics change with time
    merged = ray_app.merge_pages({"a": single})
    assert merged.decode().replace('{replica="a"}', "").replace(',replica="a"', "").splitlines() == (
        single.decode().splitlines()
    )


def scope(host: str = "127.0.0.1", **headers: str) -> dict[str, Any]:
    listed = [(name.encode(), value.encode()) for name, value in headers.items()]
    path = {"path": "/score", "raw_path": b"/score", "query_string": b"", "root_path": ""}
    return {"type": "http", "method": "POST", "headers": listed, "server": (host, 8000), **path}


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Respond with the request ID that was received."""
    given = Request(scope).headers.get("x-request-id", "none")
    await Response("scores", headers={"X-Request-Id": given.replace(" ", "")})(scope, receive, send)


async def never() -> Any:
    await asyncio.Event().wait()


def respond(
    request_scope: dict[str, Any], *, loopback_only: bool, behind_haproxy: bool = False
) -> list[dict[str, Any]]:
    """Return the messages of the response to a request."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    middleware = ray_app.RayProxyMiddleware(app, loopback_only=loopback_only, behind_haproxy=behind_haproxy)
    asyncio.run(middleware(request_scope, never, send))
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
def test_service_without_keys_serves_loopback_only(host: str, loopback_only: bool, status: int) -> None:
    """Ray's proxy may listen on any address, independently of the service's configuration."""
    start, body = respond(scope(host), loopback_only=loopback_only)
    assert start["status"] == status
    assert (b"auth.keys" in body["body"]) == (status == 403)
    assert (b"scores" in body["body"]) == (status == 200)


@pytest.mark.parametrize(("loopback_only", "status"), [(True, 403), (False, 200)])
def test_service_without_keys_refuses_all_requests_behind_haproxy(loopback_only: bool, status: int) -> None:
    """HAProxy listens on all interfaces, and its own connections all come from loopback."""
    start, _ = respond(scope("127.0.0.1"), loopback_only=loopback_only, behind_haproxy=True)
    assert start["status"] == status


@pytest.mark.parametrize(("given", "expected"), [("run-7", []), ("a b", [b"ab"])])
def test_request_id_is_not_sent_twice(given: str, expected: list[bytes]) -> None:
    """Ray's proxy adds the request's ID to the response; the service's own stays if it differs."""
    start, _ = respond(scope(**{"x-request-id": given}), loopback_only=True)
    assert [value for name, value in start["headers"] if name == b"x-request-id"] == expected


@pytest.mark.parametrize("headers", [{"accept": "a" * 60_000}, {f"x-{number}": "" for number in range(1000)}])
def test_large_head_is_refused(headers: dict[str, str]) -> None:
    """As on the service's own socket; Ray's proxy has no bounds of its own."""
    start, body = respond(scope(**headers), loopback_only=True)
    assert start["status"] == 431
    assert b"headers_too_large" in body["body"]


def test_cancelled_request_is_a_disconnect() -> None:
    """The application receives ASGI's disconnect message and can finish in order."""
    events: list[Any] = []
    started = asyncio.Event()

    async def wait_for_disconnect(_: Any, receive: Any, send: Any) -> None:
        started.set()
        events.append((await receive())["type"])
        await asyncio.sleep(0.01)
        await send({"type": "http.response.start", "status": 499, "headers": []})
        events.append("finished")

    async def run() -> None:
        sent: list[Any] = []
        middleware = ray_app.RayProxyMiddleware(wait_for_disconnect, loopback_only=True)
        serving = asyncio.ensure_future(middleware(scope(), never, sent.append))
        await started.wait()
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
        assert sent == []

    asyncio.run(run())
    assert events == ["http.disconnect", "finished"]


def test_deployment_options_follow_the_configuration(config: ServiceConfig) -> None:
    """Ray's limits are above the service's own; drain time and resources follow the configuration."""
    limits = Limits(max_queued_pairs=1000, max_connections=50)
    options = ray_app.deployment_options(
        config.model_copy(update={"limits": limits, "drain_s": 33.0, "threads": 3, "device": "cuda:0"})
    )
    assert options["max_ongoing_requests"] > 1000
    assert options["max_queued_requests"] == 50
    assert options["graceful_shutdown_timeout_s"] > 33.0
    assert options["ray_actor_options"] == {"num_cpus": 3, "num_gpus": 1}
    assert ray_app.deployment_options(config)["ray_actor_options"]["num_gpus"] == 0


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"config": "/no/such.yaml"}, r"/no/such\.yaml: no such configuration file"),
        ({"set": ["colour=red"]}, "service.colour: unknown key"),
        ({"set": "threads=none"}, "service.threads"),
        ({"configuration": "x"}, "args: configuration: .*known keys: config, set"),
        ({"set": ["auth.keys=/no/keys.yaml"]}, r"/no/keys\.yaml: cannot be read"),
        ({"set": ["calibration=/no/table.json"]}, r"/no/table\.json"),
    ],
)
def test_invalid_deployment_is_reported_in_one_line(arguments: dict[str, Any], problem: str) -> None:
    """The error comes before anything starts, and has a type that Ray shows without a traceback."""
    from ray.serve.exceptions import RayServeException

    with pytest.raises(RayServeException, match=problem) as error:
        ray_app.app(arguments)
    assert "\n" not in str(error.value)


def test_serve_run_reports_an_invalid_deployment_in_one_line(tmp_path: Path) -> None:
    """`serve run` with a missing configuration prints one line and exits with 2."""
    command = [str(Path(sys.executable).with_name("serve")), "run", "reward_service.ray_app:app"]
    found = subprocess.run(
        [*command, f"config={tmp_path}/none.yaml"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"},
    )
    assert found.returncode == 2
    assert "Traceback" not in found.stderr
    assert found.stderr.strip().splitlines()[-1].startswith(f"Error: {tmp_path}/none.yaml: no such")


def test_relative_configuration_path_is_resolved(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It starts at the working folder of `serve` or, if the file is not there, at the repository."""
    monkeypatch.chdir(checkpoints.folder)
    assert ray_app.parse_arguments({"config": "config.yaml"}).config == checkpoints.config
    assert ray_app.parse_arguments({"config": "configs/miniature.yaml"}).config == DEFAULT_CONFIG
    assert ray_app.parse_arguments({}).config == DEFAULT_CONFIG


def test_ray_configuration_matches_its_schema() -> None:
    """configs/ray.yaml is valid as it is, and with autoscaling instead of a number of replicas."""
    from ray.serve.schema import ServeDeploySchema

    text = (REPOSITORY / "configs" / "ray.yaml").read_text()
    fixed = yaml.safe_load(text)
    before, comment, after = text.partition(
        "        # Autoscaling by the pairs in progress, instead of num_replicas:\n"
    )
    assert comment
    scaled = yaml.safe_load(
        before.replace("        num_replicas: 1\n", "") + after.replace("        # ", "        ")
    )
    for found in (fixed, scaled):
        schema = ServeDeploySchema.model_validate(found)
        application = schema.applications[0]
        assert application.import_path == "reward_service.ray_app:app"
        assert application.deployments[0].name == ray_app.DEPLOYMENT_NAME
        assert schema.http_options.host == "127.0.0.1"
        given = ray_app.parse_arguments(application.args)
        assert load_config(given.config, given.set).threads == 1
    assert schema.applications[0].deployments[0].autoscaling_config["max_replicas"] == 4


def test_documented_configuration_matches_ray_schema() -> None:
    """In docs/ray.md, the Kubernetes resource is valid YAML, and its part for Ray fits Ray's schema."""
    from ray.serve.schema import ServeDeploySchema

    text = (REPOSITORY / "docs" / "ray.md").read_text()
    blocks = [block.partition("```")[0] for block in text.split("```yaml\n")[1:]]
    service, policy = yaml.safe_load_all(blocks[-1])
    schema = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    deployment = schema.applications[0].deployments[0]
    assert deployment.name == ray_app.DEPLOYMENT_NAME
    assert deployment.autoscaling_config["policy"]["policy_function"].endswith(":PairsPerReplica")
    assert set(schema.applications[0].args) <= set(ray_app.Arguments.model_fields)
    assert service["spec"]["rayClusterConfig"]["rayVersion"] == importlib.metadata.version("ray")
    assert policy["kind"] == "NetworkPolicy"
    [described] = yaml.safe_load(blocks[1])
    assert described["autoscaling_config"]["max_replicas"] == 4


def test_failed_service_is_unhealthy(config: ServiceConfig) -> None:
    """The health check raises the reason in one line, so that Ray replaces the replica; before, it passes."""
    from reward_service.scoring.service import ScoringService

    replica = object.__new__(ray_app.Replica)
    replica._exit_stack, replica._service = ray_app.ExitStack(), ScoringService(config)
    asyncio.run(replica.check_health())
    replica._service.fail("the device has failed")
    with pytest.raises(RuntimeError, match=r"^the device has failed$"):
        asyncio.run(replica.check_health())
    replica._service.close()
