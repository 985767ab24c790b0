"""Ray Serve deployment of the reward service: replicas of the same application behind one address.

Start it with `serve run configs/ray.yaml` or `serve run reward_service.ray_app:app config=FILE`. docs/ray.md
describes the differences to a single process. From top to bottom: the entry point and its arguments, the
replica, the middleware for requests that arrive through Ray's proxy, and the metrics of all replicas.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector, CollectorRegistry
from pydantic import BeforeValidator, ValidationError
from ray import serve
from ray.serve._private import constants
from ray.serve.exceptions import RayServeException
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response

from reward_service.config import ServiceConfig, load_config
from reward_service.observability.metrics import Metrics
from reward_service.observability.telemetry import Telemetry, exit_soon, open_telemetry
from reward_service.protocol import JSON, MAX_HEAD_BYTES, MAX_HEADERS, PROBLEM, ProblemError, encode
from reward_service.runtime.process import configure_openmp, freeze_objects
from reward_service.scheduler.autoscaling import PAIRS
from reward_service.scoring.auth import load_keys
from reward_service.scoring.calibration import load_calibration
from reward_service.scoring.service import RETRY_LOADING_S, ScoringService
from reward_service.settings import DEFAULT_CONFIG, ConfigError, Settings, expand_user, one_line
from reward_service.web.app import create_app
from reward_service.web.dependencies import LARGE_HEAD, request_id

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Name of the deployment; users' Ray Serve files contain it.
DEPLOYMENT_NAME = "judge"

_DRAIN_MARGIN_S = 10.0
_FINAL_RESPONSES_S = 2.0
_CANCELLED_REQUEST_S = 5.0
_METRICS_TIMEOUT_S = 5.0


# Entry point ------------------------------------------------------------------------------------------


class DeployError(RayServeException, click.ClickException):
    """Arguments or configuration that cannot be deployed.

    It has two bases because Ray shows a RayServeException, and its command line a ClickException, in one line
    without a traceback.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        click.ClickException.__init__(self, message)


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class Arguments(Settings):
    """Arguments of `app`: `args` in a Ray Serve file, or `key=value` after the import path.

    `config` is the file with the section `service:`, read on the machine of each replica. A relative path
    starts at the folder of the process or, if the file is not there, at the folder that contains `configs/`.
    `set` holds overrides, as for `reward-service serve --set`.
    """

    config: Path = DEFAULT_CONFIG
    set: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = ()


def app(arguments: dict[str, Any]) -> serve.Application:
    """Build the application for `serve run`, `serve deploy` and `serve.run`.

    Args:
        arguments: see `Arguments`

    Raises:
        DeployError: the arguments or the configuration cannot be used; the message is one line
    """
    return build_application(arguments, Replica)


def build_application(
    arguments: Mapping[str, Any], replica: type[Replica], **options: Any
) -> serve.Application:
    """Build the application with another replica class and deployment options of Ray Serve.

    Args:
        arguments: see `Arguments`
        replica: class of the replicas
        options: replace those of `deployment_options`

    Raises:
        DeployError: the arguments or the configuration cannot be used; the message is one line
    """
    try:
        parsed = parse_arguments(arguments)
        config = load_config(parsed.config, parsed.set)
        load_calibration(config.calibration, tuple(config.enabled))
        if config.auth.keys is not None:
            load_keys(config.auth.keys)
    except ConfigError as error:
        raise DeployError(str(error)) from None
    ingress: serve.Deployment = serve.deployment(name=DEPLOYMENT_NAME)(serve.ingress()(replica))
    return ingress.options(**deployment_options(config) | options).bind(str(parsed.config), list(parsed.set))


def parse_arguments(arguments: Mapping[str, Any]) -> Arguments:
    """Validate the arguments and make the path of the configuration absolute.

    Raises:
        ConfigError: an argument is unknown or has a wrong value
    """
    try:
        parsed = Arguments.model_validate(arguments)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        location = ".".join(map(str, first["loc"]))
        known = ", ".join(Arguments.model_fields)
        raise ConfigError(f"args: {location}: {one_line(first['msg'])}; known keys: {known}") from None
    try:
        path = expand_user(parsed.config)
    except ValueError as error:
        raise ConfigError(f"args: config: {error}") from None
    if not path.exists() and not path.is_absolute():
        path = DEFAULT_CONFIG.parent.parent / path
    return parsed.model_copy(update={"config": path.absolute()})


def deployment_options(config: ServiceConfig) -> dict[str, Any]:
    """Return the deployment options for a configuration; a Ray Serve file may override them.

    Ray's limits are above the service's own, so that the service refuses requests with its own problems: an
    admitted request has at least one pair, and Ray also counts requests that are being refused.
    """
    return {
        "max_ongoing_requests": 2 * config.limits.max_queued_pairs,
        # Limit of requests while no replica is available: Ray's proxy holds their bodies in memory.
        "max_queued_requests": config.limits.max_connections,
        "backpressure_config": {"status_code": 503, "retry_after_s": RETRY_LOADING_S},
        "graceful_shutdown_timeout_s": config.drain_s + _DRAIN_MARGIN_S,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 10.0,
        "logging_config": {"enable_access_log": False},  # the service's own access log has more fields
        "ray_actor_options": {
            "num_cpus": config.threads or 1,
            "num_gpus": 1 if config.device.startswith("cuda") else 0,
        },
    }


# Replica ----------------------------------------------------------------------------------------------


class Replica:
    """Replica of the reward service, which accepts requests once its models are loaded and self-tested.

    Args:
        config: path of the configuration
        overrides: of its section `service:`

    Raises:
        ConfigError: they cannot be used on this machine
    """

    def __init__(self, config: str, overrides: list[str]) -> None:
        configure_openmp()
        self._exit_stack = ExitStack()
        self._config = load_config(Path(config), overrides)
        self._telemetry = self._exit_stack.enter_context(open_telemetry(self._config))
        self._metrics = ReplicaMetrics(self._collect_pages)
        self._metrics.lost_log_lines.set_function(lambda: self._telemetry.sink.lost)
        self._name = str(serve.get_replica_context().replica_id.unique_id)

    async def __serve_build_asgi_app__(self) -> RayProxyMiddleware:
        """Return the application that Ray runs; Ray sends requests to it only afterwards.

        Raises:
            RuntimeError: the models cannot be loaded; the message is one line
        """
        self._service = await _load_service(self._config, self._metrics, self._telemetry)
        auth = self._config.auth
        web_app = create_app(self._config, self._service, self._telemetry.log, self._telemetry.tracer)
        loopback_only = auth.keys is None and not auth.allow_anonymous
        # The default is the safe value, in case a later version of Ray renames the constant.
        behind_haproxy = bool(getattr(constants, "RAY_SERVE_ENABLE_DIRECT_INGRESS", True))
        return RayProxyMiddleware(web_app, loopback_only=loopback_only, behind_haproxy=behind_haproxy)

    async def check_health(self) -> None:
        """Raise RuntimeError if the service has failed; Ray replaces a replica after three failed checks."""
        if self._service.health.status == "failed":
            raise RuntimeError(self._service.health.detail)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the input of the autoscaling policy `reward_service.ray_scaling.PairsPerReplica`."""
        return {PAIRS: self._service.admission.used["pairs"]}

    async def own_metrics(self) -> tuple[str, bytes]:
        """Return the replica's name and its own page of metrics; called by the other replicas."""
        return self._name, await asyncio.to_thread(self._metrics.render_own)

    @functools.cached_property
    def _all_replicas(self) -> Any:
        context = serve.get_replica_context()
        return serve.get_deployment_handle(context.deployment, context.app_name)

    def _collect_pages(self) -> dict[str, bytes]:
        """Return the page of every replica by its name; this replica's only if the others fail."""
        own = {self._name: self._metrics.render_own()}
        try:
            pages = self._all_replicas.broadcast("own_metrics").results(timeout_s=_METRICS_TIMEOUT_S)
        except Exception as error:  # noqa: BLE001 - a replica that is stopping, or an error of Ray
            self._telemetry.log.warning(f"metrics of this replica only: {one_line(error)}")
            return own
        return dict(pages) | own

    def __del__(self) -> None:
        """Close log and tracer; Ray calls it last, when all requests are finished."""
        self._exit_stack.close()


async def _load_service(
    config: ServiceConfig, metrics: ReplicaMetrics, telemetry: Telemetry
) -> ScoringService:
    loaded_or_failed = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_ready(detail: str) -> None:
        freeze_objects()
        telemetry.log.info(f"ready: {detail}", pid=os.getpid())
        loop.call_soon_threadsafe(loaded_or_failed.set)

    def on_failure(message: str) -> None:
        if service.has_been_ready:  # a hung device could block an orderly exit
            exit_soon(message, telemetry.log, _FINAL_RESPONSES_S)
        loop.call_soon_threadsafe(loaded_or_failed.set)

    service = ScoringService(
        config,
        on_ready=on_ready,
        on_failure=on_failure,
        on_warning=telemetry.log.warning,
        metrics=metrics,
    )
    service.start()
    await loaded_or_failed.wait()
    if service.health.status == "failed":
        raise RuntimeError(service.health.detail)
    return service


# Requests through Ray's proxy -------------------------------------------------------------------------

_REQUEST_ID = "x-request-id"
_DISCONNECT: dict[str, str] = {"type": "http.disconnect"}
_NO_KEYS = ProblemError(
    "forbidden",
    "this service has no API keys, so it serves loopback only, and nothing behind HAProxy; set auth.keys, "
    "or auth.allow_anonymous=true on a trusted network",
)


class RayProxyMiddleware:
    """ASGI middleware that makes requests through Ray's proxy equal to requests on the service's own socket.

    Args:
        app: the service
        loopback_only: refuse requests that reached the proxy by another address of this machine
        behind_haproxy: the replica's socket is behind HAProxy, which hides that address; `loopback_only` then
            refuses all requests
    """

    def __init__(self, app: ASGIApp, *, loopback_only: bool, behind_haproxy: bool = False) -> None:
        self._app, self._loopback_only, self._behind_haproxy = app, loopback_only, behind_haproxy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":  # the service itself refuses websockets
            await self._app(scope, receive, send)
        elif self._loopback_only and (self._behind_haproxy or not _is_loopback(scope)):
            await _refusal(scope, _NO_KEYS)(scope, receive, send)
        elif _has_large_head(scope):
            await _refusal(scope, LARGE_HEAD)(scope, receive, send)
        else:
            await _translate_cancellation(self._app, scope, receive, _without_duplicate_id(scope, send))


async def _translate_cancellation(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Run the application; if Ray cancels it after a disconnect, send it ASGI's disconnect message."""
    disconnected = asyncio.Event()

    async def receive_or_disconnect() -> Message:
        message, left = asyncio.ensure_future(receive()), asyncio.ensure_future(disconnected.wait())
        try:
            await asyncio.wait({message, left}, return_when=asyncio.FIRST_COMPLETED)
            return message.result() if message.done() else _DISCONNECT
        finally:
            message.cancel()
            left.cancel()

    async def send_if_connected(message: Message) -> None:
        if not disconnected.is_set():
            await send(message)

    running = asyncio.ensure_future(app(scope, receive_or_disconnect, send_if_connected))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        disconnected.set()
        await asyncio.wait({running}, timeout=_CANCELLED_REQUEST_S)
        running.cancel()
        raise


def _without_duplicate_id(scope: Scope, send: Send) -> Send:
    """Wrap `send` to drop an X-Request-Id equal to the request's, which Ray's proxy adds to the response."""
    given = Headers(scope=scope).get(_REQUEST_ID)

    async def send_without_duplicate(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            if given is not None and headers.get(_REQUEST_ID) == given:
                del headers[_REQUEST_ID]
        await send(message)

    return send_without_duplicate


def _has_large_head(scope: Scope) -> bool:
    """Return whether a request exceeds the bounds that the service has on its own socket."""
    headers = scope["headers"]
    size = sum(len(name) + len(value) for name, value in headers) + len(scope.get("query_string", b""))
    return len(headers) > MAX_HEADERS or size > MAX_HEAD_BYTES


def _refusal(scope: Scope, error: ProblemError) -> Response:
    problem = error.to_problem(request_id(Request(scope)))
    return Response(encode(problem, JSON), int(error.status), media_type=PROBLEM)


def _is_loopback(scope: Scope) -> bool:
    """Return whether the request reached the proxy by a loopback address."""
    host = (scope.get("server") or ("",))[0]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# Metrics of all replicas ------------------------------------------------------------------------------

REPLICA_LABEL = "replica"


class ReplicaMetrics(Metrics):
    """Metrics of a replica whose page shows all replicas: a scrape through the proxy reaches any of them.

    Args:
        collect_pages: returns the own pages of all replicas by name; may take long, and may lack some
    """

    def __init__(self, collect_pages: Callable[[], Mapping[str, bytes]]) -> None:
        super().__init__()
        self._collect_pages = collect_pages

    def render_own(self) -> bytes:
        """Return the page of this replica."""
        return super().render()

    def render(self) -> bytes:
        """Return the page of all replicas, the response of `/metrics`."""
        return merge_pages(self._collect_pages())


def merge_pages(pages: Mapping[str, bytes]) -> bytes:
    """Merge pages of Prometheus text; each sample gets the name of its page as the label `replica`."""
    families: dict[str, Metric] = {}
    for name, page in sorted(pages.items()):
        for family in text_string_to_metric_families(page.decode()):
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            merged.samples += [
                sample._replace(labels={REPLICA_LABEL: name, **sample.labels}) for sample in family.samples
            ]
    registry = CollectorRegistry()
    registry.register(_MetricFamilies(list(families.values())))
    return generate_latest(registry)


class _MetricFamilies(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families
