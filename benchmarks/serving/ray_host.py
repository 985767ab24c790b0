"""The service on Ray Serve, in processes of their own: `python -m benchmarks.serving.ray_host`.

A line of JSON on stdin configures it (`Cluster`). The line `listening on URL` on stdout means that all
deployments are ready: 1 replica at `URL/1`, 2 replicas at `URL/2`. The process ends on SIGTERM.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import msgspec

from benchmarks.serving.host import Setup, full_size_engine, sleeping_score

if TYPE_CHECKING:
    from reward_service.config import ServiceConfig
    from reward_service.engine.engine import RewardEngine

_MEMORY = 256 * 2**20


class Cluster(msgspec.Struct, frozen=True):
    """Service to start, with one deployment for each number of replicas."""

    setup: Setup
    replicas: list[int]
    port: int


def main() -> None:
    """Serve until SIGTERM."""
    cluster = msgspec.json.decode(sys.stdin.readline(), type=Cluster)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    folder = tempfile.mkdtemp(prefix="ray")
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        # The same priority as uvicorn's process; by default Ray lowers that of its workers.
        "RAY_worker_niceness": "0",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray prints to stdout too
    import ray
    from ray import serve

    try:
        ray.init(
            num_cpus=sum(cluster.replicas) + 1,
            object_store_memory=_MEMORY,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=folder,
        )
        serve.start(http_options={"port": cluster.port})
        for replicas in cluster.replicas:
            options = {"num_replicas": replicas}
            serve.run(_application(cluster.setup, options), name=str(replicas), route_prefix=f"/{replicas}")
        print(f"listening on http://127.0.0.1:{cluster.port}", file=output, flush=True)
        signal.pause()
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _application(setup: Setup, options: dict[str, Any]) -> Any:
    from reward_service import ray_app
    from reward_service.scoring import service

    class Replica(ray_app.Replica):
        """Replica with the benchmark's engine."""

        def __init__(self, config: str, overrides: list[str]) -> None:
            service.build_default_engine = lambda config: _engine(setup, config)
            super().__init__(config, overrides)

    return ray_app.build_application({"set": setup.overrides}, Replica, **options)


def _engine(setup: Setup, config: ServiceConfig) -> RewardEngine:
    import torch

    from reward_service.engine.loading import build_engine

    torch.set_num_threads(config.threads or 1)
    engine = full_size_engine(setup, config.batch_pairs) if setup.full else build_engine(config)
    if setup.sleep_s is not None:
        engine.score = sleeping_score(engine, setup.sleep_s)  # type: ignore[method-assign]
    return engine


if __name__ == "__main__":
    from benchmarks.serving import ray_host  # by name, so that the replicas can import it

    ray_host.main()
