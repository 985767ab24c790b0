"""Requests of the fault tests: valid ones, and bytes on a socket."""

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

TIMEOUT_S = 240.0
Outcome = tuple[int, str]
OK: Outcome = (200, "")


def sample_image(form: str = "PNG", sides: tuple[int, int] = (24, 20), **options: Any) -> bytes:
    """Return a small image file with random pixels."""
    pixels = np.random.default_rng(1).integers(0, 256, (*sides, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def encoded(data: bytes) -> dict[str, Any]:
    """Return an image file as the image of a JSON request."""
    return {"data": base64.b64encode(data).decode()}


def request_of(*prompts: str, image: dict[str, Any] | None = None, **options: Any) -> bytes:
    """Return a JSON request, with the same image for each prompt."""
    sent = image or encoded(sample_image())
    return json.dumps({"items": [{"prompt": it, "image": sent} for it in prompts], **options}).encode()


def post(url: str, body: bytes, kind: str = "application/json", **headers: str) -> httpx.Response:
    """Send a score request."""
    given = {"Content-Type": kind, **{name.replace("_", "-"): value for name, value in headers.items()}}
    return httpx.post(f"{url}/v1/score", content=body, headers=given, timeout=TIMEOUT_S)


def outcome(response: httpx.Response) -> Outcome:
    """Return status and problem code, "" for a success; check that a problem is well-formed (RFC 9457)."""
    if response.is_success:
        return response.status_code, ""
    assert response.headers["content-type"] == PROBLEM
    problem = response.json()
    assert problem["status"] == response.status_code
    assert isinstance(problem["retryable"], bool)
    assert len(problem["errors"]) <= 10
    assert len(response.content) < 6000  # never as long as what was sent
    return response.status_code, problem["code"]


def connect(url: str) -> socket.socket:
    """Open a connection."""
    at = urlsplit(url)
    return socket.create_connection((at.hostname or "", at.port or 0), timeout=TIMEOUT_S)


def head(length: object, more: str = "", version: str = "1.1", method: str = "POST") -> bytes:
    """Return the request line and headers of a request, without Content-Length if `length` is None."""
    lines = f"{method} /v1/score HTTP/{version}\r\nHost: x\r\nContent-Type: application/json\r\n{more}"
    return (lines + ("" if length is None else f"Content-Length: {length}\r\n") + "\r\n").encode()


def receive_outcome(client: socket.socket, method: str = "POST") -> Outcome:
    """Receive the next response on a connection; return its outcome."""
    response = HTTPResponse(client, method=method)
    response.begin()
    body = response.read()
    return outcome(httpx.Response(response.status, headers=dict(response.getheaders()), content=body))


def is_closed(client: socket.socket) -> bool:
    """Wait until the service closes the connection; return True."""
    try:
        while client.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True
