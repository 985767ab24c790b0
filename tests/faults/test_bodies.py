"""Invalid bodies and headers: documented status, no echo, no effect on other clients."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import msgspec
import pytest

from tests.faults.conftest import RunningService
from tests.support.faults.bystander import Bystander, undisturbed
from tests.support.faults.requests import OK, Outcome, outcome, post, request_of, sample_image

JSON, MSGPACK, FORM = "application/json", "application/msgpack", "multipart/form-data; boundary=b"
SYNTAX, SCHEMA, MEDIA = (400, "malformed_body"), (422, "invalid_request"), (415, "unsupported_media_type")
MANY = (422, "too_many_pairs")
SECRET = "do not echo me"
Case = tuple[str, Callable[[], bytes], Outcome]


@pytest.fixture(autouse=True, scope="module")
def bystander(running: RunningService, expected_scores: Any) -> Iterator[Bystander]:
    """One client for all tests, which take milliseconds each."""
    with undisturbed(running.url, expected_scores) as one:
        yield one


def items(count: int) -> bytes:
    item = json.dumps({"prompt": SECRET, "image": {"data": ""}})
    return ('{"items":[' + ",".join([item] * count) + "]}").encode()


def field(name: str, value: str) -> bytes:
    """Return a request with one more field, whose value is inserted unchanged."""
    return request_of("x")[:-1] + f',"{name}":{value}}}'.encode()


def item_with(image: str) -> bytes:
    return b'{"items":[{"prompt":"x","image":' + image.encode() + b"}]}"


def form(*parts: tuple[str, bytes], end: bytes = b"--b--\r\n") -> bytes:
    made = [
        b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (name.encode(), value)
        for name, value in parts
    ]
    return b"".join(made) + end


def mangled(form_: str) -> bytes:
    whole = request_of(SECRET)
    return {"half": whole[: len(whole) // 2], "tail": whole + b"{}", "bom": b"\xef\xbb\xbf" + whole}[form_]


PACK = msgspec.msgpack.encode
CASES: dict[str, Case] = {
    "nothing": (JSON, lambda: b"", SYNTAX),
    "half of it": (JSON, lambda: mangled("half"), SYNTAX),
    "more after it": (JSON, lambda: mangled("tail"), SYNTAX),
    "a byte order mark": (JSON, lambda: mangled("bom"), SYNTAX),
    "100,000 items": (JSON, lambda: b'{"items":[' + b'{"a":1,"b":2},' * 99_999 + b"{}]}", MANY),
    "2,000 items": (JSON, lambda: items(2000), MANY),
    "100,000 numbers for items": (JSON, lambda: b'{"items":[' + b"1," * 99_999 + b"1]}", SCHEMA),
    "100,000 fields": (
        JSON, lambda: b"{" + b",".join(b'"f%d":1' % i for i in range(100_000)) + b"}", SCHEMA),
    "100,000 evaluators": (JSON, lambda: field("evaluators", json.dumps(["clip"] * 100_000)), SCHEMA),
    "100,000 weights": (
        JSON, lambda: field("weights", json.dumps({str(i): 1 for i in range(100_000)})), SCHEMA),
    "deep arrays": (JSON, lambda: b"[" * 100_000, SCHEMA),
    "deep arrays in a field": (JSON, lambda: field(SECRET, "[" * 100_000 + "]" * 100_000), SCHEMA),
    "deep objects": (JSON, lambda: b'{"items":' * 100_000, SCHEMA),
    "deep weights": (JSON, lambda: field("weights", '{"a":' * 100_000), SCHEMA),
    "bytes that are not UTF-8": (JSON, lambda: request_of("x").replace(b'"x"', b'"\xff\xfe"'), SYNTAX),
    "overlong UTF-8": (JSON, lambda: request_of("x").replace(b'"x"', b'"\xc0\xaf"'), SYNTAX),
    "half a surrogate pair": (JSON, lambda: request_of("x").replace(b'"x"', rb'"\ud800"'), SYNTAX),
    "UTF-16": (JSON, lambda: request_of("x").decode().encode("utf-16"), SYNTAX),
    "keys that come twice": (JSON, lambda: field("normalization", '"z","normalization":"raw"'), OK),
    "items that come twice": (JSON, lambda: field("items", "[]"), (422, "empty_batch")),
    "a zero byte in the prompt": (JSON, lambda: request_of("a\0b"), OK),
    "a prompt without end": (JSON, lambda: request_of("x" * 10_001), SCHEMA),
    "no prompt": (JSON, lambda: request_of(""), SCHEMA),
    "NaN for a weight": (JSON, lambda: field("weights", '{"clip":NaN}'), SYNTAX),
    "an endless weight": (JSON, lambda: field("weights", '{"clip":1e999}'), SCHEMA),
    "a weight below 0": (JSON, lambda: field("weights", '{"clip":-1}'), SCHEMA),
    "weights that overflow": (
        JSON, lambda: field("weights", '{"clip":1e308,"hpsv2":1e308}'), (422, "bad_weights")),
    "a number of 5,000 digits": (JSON, lambda: field("weights", '{"clip":%s}' % ("9" * 5000)), SCHEMA),
    "an unknown evaluator": (JSON, lambda: field("evaluators", f'["{SECRET}"]'), (422, "unknown_evaluator")),
    "base64 with line ends": (JSON, lambda: item_with(r'{"data":"AAAA\nAAAA"}'), SCHEMA),
    "base64 cut short": (JSON, lambda: item_with('{"data":"AAA"}'), SCHEMA),
    "JSON said to be msgpack": (MSGPACK, lambda: request_of("x"), SCHEMA),
    "msgpack said to be JSON": (JSON, lambda: PACK({"items": []}), SYNTAX),
    "msgpack cut short": (MSGPACK, lambda: PACK({"items": [1, 2]})[:-1], SCHEMA),
    "msgpack that promises 4 billion items": (
        MSGPACK, lambda: b"\x81\xa5items\xdd\xff\xff\xff\xff", (422, "too_many_pairs")),
    "msgpack that promises 4 GiB": (MSGPACK, lambda: b"\x81\xdb\xff\xff\xff\xffitems", SYNTAX),
    "deep msgpack": (MSGPACK, lambda: b"\x91" * 100_000, SCHEMA),
    "msgpack of an odd type": (MSGPACK, lambda: b"\xc1" * 100, SYNTAX),
    "a form without an end": (
        FORM, lambda: form(("prompt", b"x"), ("image", sample_image()), end=b""), SYNTAX),
    "a form of another boundary": (FORM, lambda: form(("prompt", b"x")).replace(b"--b", b"--c"), SYNTAX),
    "a form of 100,000 fields": (FORM, lambda: form(*[("image", b"")] * 30_000), MANY),
    "a form without images": (FORM, lambda: form(("prompt", b"x")), (422, "empty_batch")),
    "a form whose text is not UTF-8": (
        FORM, lambda: form(("prompt", b"\xff"), ("image", sample_image())), SCHEMA),
    "another type": ("text/plain", lambda: request_of("x"), MEDIA),
    "no type": ("", lambda: request_of("x"), MEDIA),
    "another character set": ("application/json; charset=utf-16", lambda: request_of("x"), OK),
    "too long a body": (JSON, lambda: b" " * (2**21 + 1), (413, "body_too_large")),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_invalid_body(service: RunningService, name: str) -> None:
    """The problem names the mistake without echoing the body, and everything is released."""
    kind, body, expected = CASES[name]
    response = post(service.url, body(), kind)
    assert outcome(response) == expected
    assert SECRET not in response.text
    assert service.all_released()


def test_compressed_body(service: RunningService) -> None:
    """It is rejected by its header: a few bytes might become gigabytes."""
    bomb = gzip.compress(bytes(2**26), 9)
    for coding in ("gzip", "deflate", "br", "gzip, identity"):
        response = post(service.url, bomb, Content_Encoding=coding)
        assert outcome(response) == MEDIA
        assert response.headers["accept-encoding"] == "identity"
    assert outcome(post(service.url, request_of("x"), Content_Encoding="identity")) == OK


HEADERS = {
    "X-Deadline-Ms": ["", "0", "99", "-1", "1.5", "1e3", "٣", "soon", "9" * 9, "100, 200"],
    "X-Client-Id": ["a b", "x" * 65, "ä", "a/b"],
}
INVALID_HEADERS = [(name, value) for name, values in HEADERS.items() for value in values]


@pytest.mark.parametrize(("name", "value"), INVALID_HEADERS)
def test_invalid_header(service: RunningService, name: str, value: str) -> None:
    """It is rejected, never read as some other number or name."""
    headers = {"Content-Type": JSON, name: value.encode()}
    response = httpx.post(f"{service.url}/v1/score", content=request_of("x"), headers=headers)  # type: ignore[arg-type]
    assert outcome(response) == SCHEMA


def test_expired_deadline(service: RunningService, bystander: Bystander) -> None:
    """A 504 at the deadline; a simultaneous request without a deadline is scored."""
    service.device.free.clear()
    late = post(service.url, request_of("x"), X_Deadline_Ms="100")
    assert outcome(late) == (504, "deadline_exceeded")
    service.device.free.set()
    assert outcome(post(service.url, request_of("x"))) == OK
    bystander.wait_for_scores()
