"""Schemathesis against the OpenAPI document: every response is documented, whatever is sent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


def attack(port: int, cwd: Path, *options: str) -> None:
    """Have schemathesis try everything it knows; its report is the failure's message."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{port}/openapi.json"]
    command += ["--checks", ",".join(CHECKS), "--phases", "coverage,fuzzing", "--seed", "7"]
    command += ["--max-examples", "10", "--continue-on-failure", "--no-color", *options]
    found = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=cwd)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.slow
def test_the_document_is_true(config: ServiceConfig, engine: RewardEngine, tmp_path: Path) -> None:
    """No 5xx, no undocumented status, header or body, and nothing accepted that the schema refuses."""
    with running_server(config, engine) as (_, port):
        attack(port, tmp_path)


@pytest.mark.slow
def test_the_document_is_true_with_keys(config: ServiceConfig, engine: RewardEngine, tmp_path: Path) -> None:
    """The same with a key, whose absence is never overlooked."""
    key, _ = new_key(tmp_path / "keys.yaml", "schemathesis")
    auth = Auth(keys=tmp_path / "keys.yaml")
    with running_server(config.model_copy(update={"auth": auth}), engine) as (_, port):
        attack(port, tmp_path, "--header", f"Authorization: Bearer {key}")
