"""Run the Python examples of README.md, docs/scoring.md and docs/clients.md against a service on a socket."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from reward_service.protocol import (
    MSGPACK,
    EvaluatorDescription,
    EvaluatorIdentity,
    EvaluatorList,
    EvaluatorScore,
    Health,
    ItemResult,
    ScoreResponse,
    decode_request,
)
from tests.support.service.fake_service import encoded_response, http_server

ROOT = Path(__file__).resolve().parents[3]
PAGES = ("README.md", "docs/scoring.md", "docs/clients.md")
EXAMPLES = [
    pytest.param(example, id=f"{page}-{index}")
    for page in PAGES
    for index, example in enumerate(
        re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    )
    if "reward_service" in example
]
NAMES = ("aesthetic", "clip")


def service(request: httpx.Request) -> httpx.Response:
    if request.url.path == "/health/ready":
        return encoded_response(Health("ready"))
    if request.url.path == "/v1/evaluators":
        description = EvaluatorDescription("f", "c", "formula", 0, 1, 1, provisional=False)
        return encoded_response(EvaluatorList(dict.fromkeys(NAMES, description), "cpu", "float32"))
    score_request = decode_request(request.content, MSGPACK)
    scores = dict.fromkeys(NAMES, EvaluatorScore(1.0, 0.25, 0.6))
    results = [ItemResult(index, 0.6, scores, False, False) for index in range(len(score_request.items))]
    identity = dict.fromkeys(NAMES, EvaluatorIdentity("f", "c"))
    return encoded_response(ScoreResponse("id", results, identity, {}))


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_runs(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reader can copy it; it prints scores."""
    monkeypatch.chdir(tmp_path)
    for photo in ("photo.png", "photo.jpg"):
        Image.new("RGB", (8, 8), "red").save(photo)
    variables: dict[str, Any] = {
        "images": np.zeros((2, 8, 8, 3), np.uint8),
        "prompts": ["a red circle", "a blue square"],
        "metadata": [{}, {}],
    }
    with http_server(service) as url:
        code = compile(example.replace("http://127.0.0.1:8000", url), "example", "exec")
        exec(code, variables)  # noqa: S102 - our own page
        variables["client"].close()
    if "print(" in example and "except" not in example:
        assert "0.6" in capsys.readouterr().out


def test_every_adapter_has_an_example() -> None:
    """No adapter is undocumented."""
    from reward_service import adapters

    text = (ROOT / "docs/clients.md").read_text(encoding="utf-8")
    assert all(f"= {name}(" in text for name in adapters.__all__)
