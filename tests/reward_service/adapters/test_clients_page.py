"""The examples of docs/clients.md run as they stand, against a service on a socket."""

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
from tests.support.service.fake_service import answer, listening

PAGE = Path(__file__).resolve().parents[3] / "docs" / "clients.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
NAMES = ("aesthetic", "clip")


def service(request: httpx.Request) -> httpx.Response:
    if request.url.path == "/health/ready":
        return answer(Health("ready"))
    if request.url.path == "/v1/evaluators":
        it = EvaluatorDescription("f", "c", "formula", 0, 1, 1, provisional=False)
        return answer(EvaluatorList(dict.fromkeys(NAMES, it), "cpu", "float32"))
    asked = decode_request(request.content, MSGPACK)
    scores = dict.fromkeys(NAMES, EvaluatorScore(1.0, 0.25, 0.6))
    results = [ItemResult(index, 0.6, scores, False, False) for index in range(len(asked.items))]
    identity = dict.fromkeys(NAMES, EvaluatorIdentity("f", "c"))
    return answer(ScoreResponse("id", results, identity, {}))


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_runs(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reader can copy it; what it prints are scores."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8), "red").save("photo.png")
    given: dict[str, Any] = {
        "images": np.zeros((2, 8, 8, 3), np.uint8),
        "prompts": ["a red circle", "a blue square"],
        "metadata": [{}, {}],
    }
    with listening(service) as url:
        code = compile(example.replace("http://127.0.0.1:8000", url), PAGE.name, "exec")
        exec(code, given)  # noqa: S102 - our own page
        given["judge"].close()
    if "print(" in example and "except" not in example:
        assert "0.6" in capsys.readouterr().out


def test_the_page_has_an_example_for_every_adapter() -> None:
    """None is left undocumented."""
    from reward_service import adapters

    assert all(any(name in example for example in EXAMPLES) for name in adapters.__all__)
