"""Schemathesis against the OpenAPI document: every response is documented, whatever is sent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from reward_service.config import Auth, ServiceConfig
from reward_service.engine.engine import RewardEngine
from reward_service.scoring.auth import new_key
from tests.support.service.serving import running_server

# All of them but positive_data_acceptance: no schema can say which bytes are an image.
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
    "ignored_auth",
)


# 503 and 504 are documented: on a slow machine, the X-Deadline-Ms of 100 that schemathesis sends passes
# before the scores are there. The other checks verify that such a response is as documented.
CONFIG = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 503, 504]
"""
TIMEOUT_S = 1800


def run_schemathesis(port: int, folder: Path, *options: str) -> tuple[int, str]:
    """Run schemathesis against a server; return its exit status and its report."""
    config = folder / "schemathesis.toml"
    config.write_text(CONFIG)
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config)]
    command += ["run", f"http://127.0.0.1:{port}/openapi.json"]
    command += ["--checks", ",".join(CHECKS), "--phases", "coverage,fuzzing", "--seed", "7"]
    command += ["--max-examples", "10", "--continue-on-failure", "--no-color", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=folder)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
def test_responses_are_documented(config: ServiceConfig, engine: RewardEngine, tmp_path: Path) -> None:
    """No undocumented status, header or body, no failure, and no request accepted against the schema."""
    with running_server(config, engine) as (_, port):
        status, report = run_schemathesis(port, tmp_path)
    assert status == 0, report


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
def test_responses_are_documented_with_keys(
    config: ServiceConfig, engine: RewardEngine, tmp_path: Path
) -> None:
    """The same with an API key; a request without it is never accepted."""
    key, _ = new_key(tmp_path / "keys.yaml", "schemathesis")
    auth = Auth(keys=tmp_path / "keys.yaml")
    with running_server(config.model_copy(update={"auth": auth}), engine) as (_, port):
        status, report = run_schemathesis(port, tmp_path, "--header", f"Authorization: Bearer {key}")
    assert status == 0, report


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
def test_undocumented_server_error_is_reported(
    config: ServiceConfig, engine: RewardEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The allowance for 503 and 504 covers no other server error."""

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("broken")

    with running_server(config, engine) as (server, port):
        monkeypatch.setattr(server.config.app.state.service, "describe", fail)  # type: ignore[union-attr]
        status, report = run_schemathesis(port, tmp_path, "--include-path", "/v1/evaluators")
    assert status == 1, report
    assert "Server error" in report
