"""The service on Ray Serve: replicas of the same application behind one address, on one machine or many.

`serve run configs/ray.yaml`, or `serve run reward_service.ray_app:app config=FILE`. What differs from one
process is in docs/ray.md.

What is different about a request that came through Ray's proxy, made the same as on a socket of ours.

One page of metrics for all replicas: a scrape through a proxy reaches any of them, and none twice.
"""

from __future__ import annotations

import asyncio
import ipaddress
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response

from reward_service.protocol import JSON, PROBLEM, ProblemError, encode
from reward_service.web.dependencies import request_id

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import click
from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector, CollectorRegistry
from pydantic import BeforeValidator, ValidationError
from ray import serve
from ray.serve._private import constants
from ray.serve.exceptions import RayServeException

from reward_service.config import ServiceConfig, load_config
from reward_service.observability.metrics import Metrics
from reward_service.observability.tracing import Reporting, end_soon, reporting
from reward_service.scheduler.autoscaling import PAIRS
from reward_service.scoring.auth import load_keys
from reward_service.scoring.calibration import load_calibration
from reward_service.scoring.service import RETRY_LOADING_S, ScoringService
from reward_service.settings import DEFAULT_CONFIG, ConfigError, Settings, one_line, rest_idle_threads
from reward_service.web.app import create_app

_REQUEST_ID = "x-request-id"
_GONE: dict[str, str] = {"type": "http.disconnect"}
_LAST_STEPS_S = 5.0
_EXPOSED = ProblemError(
    "forbidden",
    "this service has no keys and answers on loopback only, behind HAProxy nowhere: set auth.keys, "
    "or auth.allow_anonymous=true where a trusted network surrounds it",
)


class Door:
    """An ASGI application behind Ray's proxy.

    Args:
        app: the service
        loopback_only: refuse whoever comes by another address of this machine
        direct: the replica's own socket is behind HAProxy, which hides how callers came: refuse all then
    """

    def __init__(self, app: ASGIApp, *, loopback_only: bool, direct: bool = False) -> None:
        self._app, self._loopback_only, self._direct = app, loopback_only, direct

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":  # the service has no websockets and says so
            await self._app(scope, receive, send)
        elif self._loopback_only and (self._direct or not _is_loopback(scope)):
            await _refusal(scope)(scope, receive, send)
        else:
            await _until_gone(self._app, scope, receive, _one_id(scope, send))


async def _until_gone(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Ray cancels what a caller has left; the application is told by the message that ASGI has for it."""
    gone = asyncio.Event()

    async def receiving() -> Message:
        message, left = asyncio.ensure_future(receive()), asyncio.ensure_future(gone.wait())
        try:
            await asyncio.wait({message, left}, return_when=asyncio.FIRST_COMPLETED)
            return message.result() if message.done() else _GONE
        finally:
            message.cancel()
            left.cancel()

    async def sending(message: Message) -> None:
        if not gone.is_set():
            await send(message)

    answering = asyncio.ensure_future(app(scope, receiving, sending))
    try:
        await asyncio.shield(answering)
    except asyncio.CancelledError:
        gone.set()
        await asyncio.wait({answering}, timeout=_LAST_STEPS_S)
        answering.cancel()
        raise


def _one_id(scope: Scope, send: Send) -> Send:
    """Without our X-Request-Id where it is the request's: the proxy puts that on every answer, once more."""
    given = Headers(scope=scope).get(_REQUEST_ID)

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            if given is not None and headers.get(_REQUEST_ID) == given:
                del headers[_REQUEST_ID]
        await send(message)

    return sending


def _refusal(scope: Scope) -> Response:
    problem = _EXPOSED.as_problem(request_id(Request(scope)))
    return Response(encode(problem, JSON), int(_EXPOSED.status), media_type=PROBLEM)


def _is_loopback(scope: Scope) -> bool:
    """Whether the proxy was reached by a loopback address."""
    host = (scope.get("server") or ("",))[0]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


LABEL = "replica"


class ReplicaMetrics(Metrics):
    """A replica's metrics, whose page shows every replica's, told apart by the label `replica`.

    Args:
        pages: gets all replicas' own pages by their names; may take its time, and may lack some
    """

    def __init__(self, pages: Callable[[], Mapping[str, bytes]]) -> None:
        super().__init__()
        self._pages = pages

    def own(self) -> bytes:
        """This replica's page."""
        return super().render()

    def render(self) -> bytes:
        """The answer of `/metrics`."""
        return merged(self._pages())


def merged(pages: Mapping[str, bytes]) -> bytes:
    """Pages of Prometheus text as one, each sample with the name of its page as the label `replica`."""
    families: dict[str, Metric] = {}
    for name, page in sorted(pages.items()):
        for family in text_string_to_metric_families(page.decode()):
            known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            known.samples += [
                sample._replace(labels={LABEL: name, **sample.labels}) for sample in family.samples
            ]
    registry = CollectorRegistry()
    registry.register(_Families(list(families.values())))
    return generate_latest(registry)


class _Families(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


#: Of the deployment; a file of Ray's calls it so.
NAME = "judge"
_DRAIN_MARGIN_S = 10.0
_LAST_ANSWERS_S = 2.0
_PAGE_TIMEOUT_S = 5.0


class DeployError(RayServeException, click.ClickException):
    """What to serve cannot be served. Ray shows a RayServeException, and its command line a click one, in a
    line and without a traceback.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        click.ClickException.__init__(self, message)


def _one_or_more(given: object) -> object:
    return [given] if isinstance(given, str) else given


class Arguments(Settings):
    """`args` in a configuration of Ray's, or `key=value` after the import path.

    `config`: the file with the section `service:`; a relative path starts in the folder of the process,
    or, if it is not there, in the one that holds `configs/`. It is read on the machine of each replica.
    `set`: overrides, as `reward-service serve --set` takes them.
    """

    config: Path = DEFAULT_CONFIG
    set: Annotated[tuple[str, ...], BeforeValidator(_one_or_more)] = ()


def app(arguments: dict[str, Any]) -> serve.Application:
    """The application for `serve run`, `serve deploy` and `serve.run`.

    Args:
        arguments: see `Arguments`

    Raises:
        DeployError: they, the configuration or what it names cannot be used, in one line
    """
    return application(arguments, Replica)


def application(arguments: Mapping[str, Any], replica: type[Replica], **options: Any) -> serve.Application:
    """`app` with another replica, and with options of Ray's in place of `deployment`'s."""
    try:
        given = _arguments(arguments)
        config = load_config(given.config, given.set)
        load_calibration(config.calibration, tuple(config.enabled))
        if config.auth.keys is not None:
            load_keys(config.auth.keys)
    except ConfigError as error:
        raise DeployError(str(error)) from None
    ingress: serve.Deployment = serve.deployment(name=NAME)(serve.ingress()(replica))
    return ingress.options(**deployment(config) | options).bind(str(given.config), list(given.set))


def _arguments(given: Mapping[str, Any]) -> Arguments:
    try:
        arguments = Arguments.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        known = ", ".join(Arguments.model_fields)
        raise ConfigError(f"args: {where}: {one_line(first['msg'])}; known here: {known}") from None
    path = arguments.config.expanduser()
    if not path.exists() and not path.is_absolute():
        path = DEFAULT_CONFIG.parent.parent / path
    return arguments.model_copy(update={"config": path.absolute()})


def deployment(config: ServiceConfig) -> dict[str, Any]:
    """Options of Ray's that suit a configuration; a file of Ray's may say otherwise.

    Ray's own bounds stand above ours, so that ours decide, in our words: an admitted request is at least a
    pair, and Ray counts those too that are being refused.
    """
    return {
        "max_ongoing_requests": 2 * config.limits.max_queued_pairs,
        # While no replica takes requests: Ray's proxy holds their bodies, so there is an end to it.
        "max_queued_requests": config.limits.max_connections,
        "backpressure_config": {"status_code": 503, "retry_after_s": RETRY_LOADING_S},
        "graceful_shutdown_timeout_s": config.drain_s + _DRAIN_MARGIN_S,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 10.0,
        "logging_config": {"enable_access_log": False},  # ours says more
        "ray_actor_options": {
            "num_cpus": config.threads or 1,
            "num_gpus": 1 if config.device.startswith("cuda") else 0,
        },
    }


class Replica:
    """One judge of several, as Ray Serve runs it. It takes requests once its models are loaded and proven.

    Args:
        config: path of the configuration
        overrides: of its section `service:`

    Raises:
        ConfigError: they cannot be used on this machine
    """

    def __init__(self, config: str, overrides: list[str]) -> None:
        rest_idle_threads()
        self._closing = ExitStack()
        self._config = load_config(Path(config), overrides)
        self._report = self._closing.enter_context(reporting(self._config))
        self._metrics = ReplicaMetrics(self._pages)
        self._metrics.lost_log_lines.set_function(lambda: self._report.sink.lost)
        self._name = str(serve.get_replica_context().replica_id.unique_id)

    async def __serve_build_asgi_app__(self) -> Door:
        """The service, for Ray to run, which sends nothing to it before this returns.

        Raises:
            RuntimeError: it will never score, in one line
        """
        self._judge = await _loaded(self._config, self._metrics, self._report)
        auth = self._config.auth
        service = create_app(self._config, self._judge, self._report.log, self._report.tracer)
        loopback_only = auth.keys is None and not auth.allow_anonymous
        # Closed where a newer Ray calls it otherwise.
        direct = bool(getattr(constants, "RAY_SERVE_ENABLE_DIRECT_INGRESS", True))
        return Door(service, loopback_only=loopback_only, direct=direct)

    async def check_health(self) -> None:
        """Ray asks every few seconds, and replaces a replica that raises thrice."""
        if self._judge.health.status == "failed":
            raise RuntimeError(self._judge.health.detail)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What `reward_service.ray_scaling.PairsPerReplica` decides by."""
        return {PAIRS: self._judge.admission.used["pairs"]}

    async def own_metrics(self) -> tuple[str, bytes]:
        """This replica's name and its page of metrics."""
        return self._name, await asyncio.to_thread(self._metrics.own)

    @functools.cached_property
    def _siblings(self) -> Any:
        context = serve.get_replica_context()
        return serve.get_deployment_handle(context.deployment, context.app_name)

    def _pages(self) -> dict[str, bytes]:
        own = {self._name: self._metrics.own()}
        try:
            found = self._siblings.broadcast("own_metrics").results(timeout_s=_PAGE_TIMEOUT_S)
        except Exception as error:  # noqa: BLE001 - one that is ending, or Ray's own trouble: ours at least
            self._report.log.warning(f"metrics of this replica only: {one_line(error)}")
            return own
        return dict(found) | own

    def __del__(self) -> None:
        """Ray calls it at the end, after everything is answered."""
        self._closing.close()


async def _loaded(config: ServiceConfig, metrics: ReplicaMetrics, report: Reporting) -> ScoringService:
    settled = asyncio.Event()
    loop = asyncio.get_running_loop()

    def ready(detail: str) -> None:
        report.log.info(f"ready: {detail}", pid=os.getpid())
        loop.call_soon_threadsafe(settled.set)

    def failed(message: str) -> None:
        if service.served:  # a device that hangs could hold up any orderly end
            end_soon(message, report.log, _LAST_ANSWERS_S)
        loop.call_soon_threadsafe(settled.set)

    service = ScoringService(
        config, on_ready=ready, on_failure=failed, on_notice=report.log.warning, metrics=metrics
    )
    service.start()
    await settled.wait()
    if service.health.status == "failed":
        raise RuntimeError(service.health.detail)
    return service
