"""Callers of the tests: well-formed ones, and bytes on a socket."""

from __future__ import annotations

import base64
import io
import json
import socket
from http.client import HTTPResponse
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
from PIL import Image

from reward_service.protocol import PROBLEM

ASK_S = 60.0
Told = tuple[int, str]
OK: Told = (200, "")


def sample_image(form: str = "PNG", sides: tuple[int, int] = (24, 20), **options: Any) -> bytes:
    """A small image file with something in it."""
    pixels = np.random.default_rng(1).integers(0, 256, (*sides, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def encoded(data: bytes) -> dict[str, Any]:
    """An image of a JSON request."""
    return {"data": base64.b64encode(data).decode()}


def request_of(*prompts: str, image: dict[str, Any] | None = None, **options: Any) -> bytes:
    """A JSON request."""
    shown = image or encoded(sample_image())
    return json.dumps({"items": [{"prompt": it, "image": shown} for it in prompts], **options}).encode()


def post(url: str, body: bytes, kind: str = "application/json", **headers: str) -> httpx.Response:
    """Ask for scores."""
    given = {"Content-Type": kind, **{name.replace("_", "-"): value for name, value in headers.items()}}
    return httpx.post(f"{url}/v1/score", content=body, headers=given, timeout=ASK_S)


def told(answer: httpx.Response) -> Told:
    """Status and problem code, "" for a success; a problem is RFC 9457's and says whether to try again."""
    if answer.is_success:
        return answer.status_code, ""
    assert answer.headers["content-type"] == PROBLEM
    problem = answer.json()
    assert problem["status"] == answer.status_code
    assert isinstance(problem["retryable"], bool)
    assert len(problem["errors"]) <= 10
    assert len(answer.content) < 6000  # never as long as what was sent
    return answer.status_code, problem["code"]


def connect(url: str) -> socket.socket:
    """A bare connection."""
    at = urlsplit(url)
    return socket.create_connection((at.hostname or "", at.port or 0), timeout=ASK_S)


def head(length: object, more: str = "", version: str = "1.1", method: str = "POST") -> bytes:
    """A request's head; `length` None leaves Content-Length out."""
    lines = f"{method} /v1/score HTTP/{version}\r\nHost: x\r\nContent-Type: application/json\r\n{more}"
    return (lines + ("" if length is None else f"Content-Length: {length}\r\n") + "\r\n").encode()


def heard(caller: socket.socket, method: str = "POST") -> Told:
    """The next answer on a bare connection, as `told` has it."""
    answer = HTTPResponse(caller, method=method)
    answer.begin()
    body = answer.read()
    return told(httpx.Response(answer.status, headers=dict(answer.getheaders()), content=body))


def closed(caller: socket.socket) -> bool:
    """Whether the service closes the connection; waits for it."""
    try:
        while caller.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True
