"""Environment of every test: one thread a process, no hub, and a stated reason for each skipped test."""

import os
import shutil
import signal
import subprocess
from functools import cache

import pytest

# Set before anything imports torch or huggingface_hub; child processes inherit it. One thread each, because
# the workers of pytest-xdist share the cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

# A background process of a shell ignores SIGINT, and its children inherit that; tests send SIGINT to theirs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@cache
def _no_engine() -> str | None:
    """Return the reason why no container engine can be used, or None."""
    if shutil.which("docker") is None:
        return "no docker command on this machine"
    if subprocess.run(["docker", "info"], capture_output=True, check=False, timeout=60).returncode != 0:
        return "no container engine responds to `docker info`"
    if shutil.which("docker-compose") is None and not _has_compose_plugin():
        return "neither `docker compose` nor docker-compose on this machine"
    return None


def _has_compose_plugin() -> bool:
    return subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0


@cache
def _no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "no CUDA device on this machine"


@cache
def _no_network() -> str | None:
    return None if os.environ.get("TEST_NETWORK") == "1" else "needs a wider network: set TEST_NETWORK=1"


REASONS = {"docker": _no_engine, "gpu": _no_gpu, "network": _no_network}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that this machine cannot run, with the reason."""
    for marker, find_reason in REASONS.items():
        if item.get_closest_marker(marker) and (reason := find_reason()):
            pytest.skip(reason)
