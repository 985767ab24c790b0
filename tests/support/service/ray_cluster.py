"""A Ray cluster on this machine in a process of its own, which takes orders on stdin.

Nothing of Ray's threads, settings and warnings gets into the tests' process, and all ends with that one.

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

DEPLOY_S, END_S = 150.0, 60.0
NAME = "judge"


class Cluster:
    """Orders for the program, and their answers."""

    def __init__(self, program: subprocess.Popen[str], port: int) -> None:
        self._program, self.url = program, f"http://127.0.0.1:{port}"
        self._deployed: dict[str, Any] | None = None

    def deploy(self, *, wait: bool = True, **application: Any) -> None:
        """Have an application run, with the fields of Ray's schema; nothing if it does already."""
        if application != self._deployed:
            self._order("deploy", {"name": NAME, "route_prefix": "/", **application})
            self._deployed = application
        if wait:
            self.wait_until_running()

    def wait_until_running(self) -> None:
        """Until it runs as deployed."""
        deadline = time.monotonic() + DEPLOY_S
        while (status := self.status())["status"] != "RUNNING":
            assert status["status"] != "DEPLOY_FAILED", status["message"]
            assert time.monotonic() < deadline, status
            time.sleep(0.1)

    def status(self) -> dict[str, Any]:
        """`status` and `message` of the application, `replicas` by their state."""
        found: dict[str, Any] = self._order("status")
        return found

    def pids(self) -> list[int]:
        """The processes of the replicas that live."""
        found: list[int] = self._order("pids")
        return found

    def delete(self) -> None:
        """End the application in order."""
        self._deployed = None
        self._order("delete")

    def _order(self, what: str, given: Any = None) -> Any:
        assert self._program.stdin is not None
        assert self._program.stdout is not None
        self._program.stdin.write(json.dumps([what, given]) + "\n")
        self._program.stdin.flush()
        answer = self._program.stdout.readline()
        assert answer, f"the cluster's program has ended: {self._program.poll()}"
        return json.loads(answer)


@contextmanager
def cluster(log: Path) -> Iterator[Cluster]:
    """A cluster without an application; one at a time on this machine, whoever else runs tests."""
    # Not in pytest's folder: the paths of Ray's sockets may have 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    with (Path(tempfile.gettempdir()) / "reward-ray-tests.lock").open("w") as lock, log.open("wb") as errors:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, "-m", "tests.support.service.ray_cluster", str(folder), str(_free_port())]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        program = subprocess.Popen(
            command, text=True, start_new_session=True, env=_environment(folder), **pipes
        )
        try:
            assert program.stdout is not None
            assert program.stdout.readline() == "ready\n", log.read_text(errors="replace")[-3000:]
            yield Cluster(program, int(command[-1]))
            program.communicate(timeout=END_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
            program.wait()
            shutil.rmtree(folder, ignore_errors=True)


def _environment(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "HOME": str(folder),
        "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")]),
        "PYTHONWARNINGS": "ignore",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # As urgent as the tests that wait for them; by default Ray's processes give way to all others.
        "RAY_worker_niceness": "0",
        # How soon the autoscaler hears of a queue; ten seconds by default.
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    }


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def main(folder: str, port: str) -> None:
    """Start, obey until stdin ends, and take everything down."""
    import ray
    from ray import serve

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is printed
    small = 80 * 2**20
    options = {"num_cpus": 4, "include_dashboard": False, "object_store_memory": small, "_temp_dir": folder}
    ray.init(**options)
    serve.start(http_options={"port": int(port)})
    answers.write("ready\n")
    for line in sys.stdin:
        what, given = json.loads(line)
        answers.write(json.dumps(_obey(what, given)) + "\n")
    serve.shutdown()
    ray.shutdown()


def _obey(what: str, given: Any) -> Any:
    from ray import serve
    from ray._private.state import actors
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    if what == "deploy":
        schema = ServeDeploySchema.model_validate({"applications": [given]})
        return _get_global_client().deploy_apps(schema, _blocking=False)
    if what == "delete":
        return serve.delete(NAME)
    if what == "pids":
        alive = [actor for actor in actors().values() if actor["State"] == "ALIVE"]
        return [actor["Pid"] for actor in alive if "ServeReplica" in actor["ActorClassName"]]
    found = serve.status().applications.get(NAME)
    if found is None:
        return {"status": "NOT_STARTED", "message": "", "replicas": {}}
    replicas = found.deployments[NAME].replica_states if NAME in found.deployments else {}
    return {"status": found.status.value, "message": found.message, "replicas": replicas}


if __name__ == "__main__":
    main(*sys.argv[1:])
