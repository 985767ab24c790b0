"""Ray cluster on this machine, in a separate process that reads commands from stdin.

Ray's threads, settings and warnings stay out of the test process, and everything ends with it.

Run as a program: `python -m tests.support.service.ray_cluster FOLDER`.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

DEPLOY_S, END_S = 600.0, 300.0  # limits for a machine under load
NAME = "judge"


class Cluster:
    """Client of the cluster process: sends commands and reads results."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self._process, self.url = process, f"http://127.0.0.1:{port}"
        self._deployed: dict[str, Any] | None = None

    def deploy(self, *, wait: bool = True, **application: Any) -> None:
        """Deploy an application with the fields of Ray's schema, unless it is already deployed."""
        if application != self._deployed:
            self._send("deploy", {"name": NAME, "route_prefix": "/", **application})
            self._deployed = application
        if wait:
            self.wait_until_running()

    def wait_until_running(self) -> None:
        """Wait until the application runs as deployed."""
        deadline = time.monotonic() + DEPLOY_S
        while (status := self.status())["status"] != "RUNNING":
            assert status["status"] != "DEPLOY_FAILED", status["message"]
            assert time.monotonic() < deadline, status
            time.sleep(0.1)

    def status(self) -> dict[str, Any]:
        """Return `status` and `message` of the application, and `replicas` by their state."""
        found: dict[str, Any] = self._send("status")
        return found

    def pids(self) -> list[int]:
        """Return the process IDs of the running replicas."""
        found: list[int] = self._send("pids")
        return found

    def delete(self) -> None:
        """Shut the application down in order."""
        self._deployed = None
        self._send("delete")

    def _send(self, command: str, argument: Any = None) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([command, argument]) + "\n")
        self._process.stdin.flush()
        result = self._process.stdout.readline()
        assert result, f"the cluster process has exited: {self._process.poll()}"
        return json.loads(result)


@contextmanager
def cluster(log: Path) -> Iterator[Cluster]:
    """Start a cluster without an application; concurrent test runs on this machine wait for each other."""
    # Not in pytest's folder: the path of a socket has at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    with (Path(tempfile.gettempdir()) / "reward-ray-tests.lock").open("w") as lock, log.open("wb") as errors:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, "-m", "tests.support.service.ray_cluster", str(folder), str(_free_port())]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        process = subprocess.Popen(
            command, text=True, start_new_session=True, env=_environment(folder), **pipes
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", log.read_text(errors="replace")[-3000:]
            yield Cluster(process, int(command[-1]))
            process.communicate(timeout=END_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            shutil.rmtree(folder, ignore_errors=True)


def _environment(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "HOME": str(folder),
        "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")]),
        "PYTHONWARNINGS": "ignore",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # The same priority as the tests that wait for them; by default Ray lowers that of its processes.
        "RAY_worker_niceness": "0",
        # Interval of the reports to the autoscaler; ten seconds by default.
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    }


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def main(folder: str, port: str) -> None:
    """Start the cluster, run commands until stdin ends, and shut everything down."""
    import ray
    from ray import serve

    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # other output must not mix with the results
    small = 80 * 2**20
    options = {"num_cpus": 4, "include_dashboard": False, "object_store_memory": small, "_temp_dir": folder}
    ray.init(**options)
    serve.start(http_options={"port": int(port)})
    results.write("ready\n")
    for line in sys.stdin:
        command, argument = json.loads(line)
        results.write(json.dumps(_run_command(command, argument)) + "\n")
    serve.shutdown()
    ray.shutdown()


def _run_command(command: str, argument: Any) -> Any:
    from ray import serve
    from ray._private.state import actors
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    if command == "deploy":
        schema = ServeDeploySchema.model_validate({"applications": [argument]})
        return _get_global_client().deploy_apps(schema, _blocking=False)
    if command == "delete":
        return serve.delete(NAME)
    if command == "pids":
        alive = [actor for actor in actors().values() if actor["State"] == "ALIVE"]
        return [actor["Pid"] for actor in alive if "ServeReplica" in actor["ActorClassName"]]
    found = serve.status().applications.get(NAME)
    if found is None:
        return {"status": "NOT_STARTED", "message": "", "replicas": {}}
    replicas = found.deployments[NAME].replica_states if NAME in found.deployments else {}
    return {"status": found.status.value, "message": found.message, "replicas": replicas}


if __name__ == "__main__":
    main(*sys.argv[1:])
