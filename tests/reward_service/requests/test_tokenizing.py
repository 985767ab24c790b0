"""Tokenizing of requests: off the device's thread, and a bad prompt is the problem of its item alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from reward_service.config import ServiceConfig
from reward_service.engine.engine import RewardEngine
from reward_service.engine.tokenizer import CachedTokenizer, Tokens
from reward_service.engine.types import Pair
from reward_service.requests.tokenizing import prompt_slices
from reward_service.scoring.service import ScoringService
from reward_service.web.app import create_app
from tests.support.service.serving import http_client, ready_service


@pytest.fixture(scope="module")
def service(config: ServiceConfig, engine: RewardEngine) -> Iterator[ScoringService]:
    with ready_service(config, engine) as service:
        yield service


@pytest.fixture
def app(config: ServiceConfig, service: ScoringService) -> FastAPI:
    return create_app(config, service)


@pytest.fixture
def tokenizing_threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the threads that tokenized a prompt; a prompt with `bad` in it raises."""
    threads: list[str] = []
    tokenize = CachedTokenizer.__call__

    def record(self: CachedTokenizer, prompt: str) -> Tokens:
        threads.append(threading.current_thread().name)
        if "bad" in prompt:
            raise ValueError(f"secret: {prompt}")
        return tokenize(self, prompt)

    monkeypatch.setattr(CachedTokenizer, "__call__", record)
    return threads


def post(app: FastAPI, body: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        async with http_client(app) as client:
            return await client.post("/score", json=body)

    return asyncio.run(run())


def items(item: dict[str, Any], *prompts: str) -> dict[str, Any]:
    return {"items": [{**item, "prompt": prompt} for prompt in prompts]}


def test_prompts_are_tokenized_off_the_devices_thread(
    app: FastAPI, item: dict[str, Any], tokenizing_threads: list[str]
) -> None:
    """On the threads that take turns among clients, whether they are new or cached."""
    for prompts in (("new here", "new there"), ("new here",)):
        tokenizing_threads.clear()
        assert post(app, items(item, *prompts)).status_code == 200
        assert tokenizing_threads
        assert all(name.startswith("decode") for name in tokenizing_threads)


def test_prompt_that_cannot_be_tokenized_is_the_items_problem(
    app: FastAPI, service: ScoringService, item: dict[str, Any], tokenizing_threads: list[str]
) -> None:
    """422 with the index and without the prompt; ten such requests take no evaluator out of service."""
    for number in range(10):
        response = post(app, items(item, "fine", f"bad {number}"))
        assert response.status_code == 422
        body = response.json()
        assert body["code"] == "invalid_request"
        assert [error["index"] for error in body["errors"]] == [1]
        assert "the prompt cannot be tokenized (ValueError)" in body["detail"]
        assert "secret" not in response.text
        assert "bad" not in body["detail"]
    assert post(app, items(item, "fine")).status_code == 200
    backend = service._loaded_backend()
    assert backend.breakers.out_of_service(("aesthetic", "clip", "pickscore", "hpsv2")) == {}


@pytest.mark.parametrize(
    "prompt",
    [f"&#{'9' * 4301};", f"&#{'0' * 5000};", "x" * 10_000, "😀" * 10_000, "é&" + "amp;" * 2400, "\x00"],
    ids=["number", "zeros", "letters", "emoji", "nested", "nul"],
)
def test_extreme_prompts_are_scored(app: FastAPI, item: dict[str, Any], prompt: str) -> None:
    """They raise or take seconds in the references."""
    assert post(app, items(item, prompt)).status_code == 200


def test_requests_without_prompt_readers_tokenize_nothing(
    app: FastAPI, item: dict[str, Any], tokenizing_threads: list[str]
) -> None:
    """The aesthetic score reads no prompt."""
    assert post(app, {**items(item, "bad"), "evaluators": ["aesthetic"]}).status_code == 200
    assert tokenizing_threads == []


def test_prompts_are_cut_into_slices_by_their_length() -> None:
    """Each distinct prompt once, with the first item that has it; other requests run between two slices."""
    image = np.zeros((1, 1, 3), np.uint8)
    pairs = [Pair(prompt, image) for prompt in ("a", "b" * 9999, "a", "c" * 99, "d")]
    slices = list(prompt_slices(pairs))
    assert [[(prompt[0], index) for prompt, index in part.items()] for part in slices] == [
        [("a", 0), ("b", 1)],
        [("c", 3), ("d", 4)],
    ]
    assert list(prompt_slices([])) == []
