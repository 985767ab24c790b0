"""Forms: requests as curl sends them, equal to JSON requests."""

from __future__ import annotations

import asyncio
import base64
import tracemalloc
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from reward_service.config import ServiceConfig
from reward_service.engine.engine import RewardEngine
from reward_service.images import Pixels
from reward_service.protocol import MAX_PAIRS, Item, MalformedBodyError, Picture, ScoreRequest
from reward_service.requests.forms import decode_form
from reward_service.web.app import create_app
from tests.support.service.serving import http_client, png, ready_service

BOUNDARY = "multipart/form-data; boundary=xx"
Part = tuple[str, bytes]


def form(*parts: Part, end: bytes = b"--xx--\r\n") -> bytes:
    lines = [
        b'--xx\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (name.encode(), value)
        for name, value in parts
    ]
    return b"".join(lines) + end


@pytest.fixture(scope="module")
def app(config: ServiceConfig, engine: RewardEngine) -> Iterator[FastAPI]:
    with ready_service(config, engine) as service:
        yield create_app(config, service)


def post(app: FastAPI | str, **how: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with http_client(app) as client:
            return await client.post("/score", **how)

    return asyncio.run(ask())


def test_form_gets_the_same_scores_as_json(app: FastAPI, images: list[Pixels]) -> None:
    """Files with names and types, as curl sends them, get the scores of the same pairs in JSON."""
    files = [png(image) for image in images[:2]]
    prompts = ["a red square", 'ünïcode; "quotes"']
    sent = [("image", (f"{number}.png", file, "image/png")) for number, file in enumerate(files)]
    fields = {"prompt": prompts, "evaluators": "clip, pickscore", "weights": '{"clip": 2}'}
    response = post(app, data={**fields, "normalization": "z", "deterministic": "true"}, files=sent)
    items = [
        {"prompt": prompt, "image": {"data": base64.b64encode(file).decode()}}
        for prompt, file in zip(prompts, files, strict=True)
    ]
    body = {"items": items, "evaluators": ["clip", "pickscore"], "weights": {"clip": 2}}
    same = post(app, json={**body, "normalization": "z", "deterministic": True})
    assert (response.status_code, same.status_code) == (200, 200)
    assert response.json()["results"] == same.json()["results"]


def test_one_prompt_applies_to_all_images() -> None:
    """One prompt and three images are three pairs."""
    request = decode_form(form(("prompt", b"x"), *[("image", b"%d" % n) for n in range(3)]), BOUNDARY)
    assert request == ScoreRequest([Item("x", Picture(b"%d" % n)) for n in range(3)])


def test_pairs_follow_the_order_of_fields() -> None:
    """The first prompt belongs to the first image, however the fields are mixed."""
    parts = [("prompt", b"a"), ("image", b"1"), ("image", b"2"), ("deterministic", b"true"), ("prompt", b"b")]
    request = decode_form(form(*parts), BOUNDARY)
    assert request == ScoreRequest([Item("a", Picture(b"1")), Item("b", Picture(b"2"))], deterministic=True)


def test_image_bytes_are_unchanged() -> None:
    """Bytes that look like a boundary, line ends and zeros are preserved."""
    data = b"\r\n--x\r\n--xy--\r\n\0\r\r\n-"
    request = decode_form(form(("prompt", b"a"), ("image", data)), BOUNDARY)
    assert request.items[0].image.data == data


PAIR: tuple[Part, Part] = (("prompt", b"x"), ("image", b"y"))
INVALID_FORMS: dict[str, tuple[bytes, str]] = {
    "no parts": (form(), "empty_batch"),
    "no image": (form(("prompt", b"secret")), "empty_batch"),
    "no prompt": (form(("image", b"secret")), "invalid_request"),
    "two for three": (form(*[("prompt", b"secret")] * 2, *[("image", b"y")] * 3), "invalid_request"),
    "unknown field": (form(*PAIR, ("secret", b"1")), "invalid_request"),
    "twice": (form(*PAIR, ("weights", b'{"clip": 1}'), ("weights", b"{}")), "invalid_request"),
    "weights": (form(*PAIR, ("weights", b"secret")), "invalid_request"),
    "deep weights": (form(*PAIR, ("weights", b"[" * 100_000)), "invalid_request"),
    "weights of words": (form(*PAIR, ("weights", b'{"clip": "secret"}')), "invalid_request"),
    "boolean": (form(*PAIR, ("deterministic", b"secret")), "invalid_request"),
    "normalization": (form(*PAIR, ("normalization", b"secret!")), "invalid_request"),
    "not UTF-8": (form(("prompt", b"\xff"), ("image", b"y")), "invalid_request"),
    "empty prompt": (form(("prompt", b""), ("image", b"y")), "invalid_request"),
    "not an image": (form(*PAIR), "not_an_image"),
    "too many": (form(*[("image", b"y")] * (2 * MAX_PAIRS + 6)), "too_many_pairs"),
    "one too many": (form(("prompt", b"x"), *[("image", b"y")] * (MAX_PAIRS + 1)), "too_many_pairs"),
    "cut off": (form(*PAIR, end=b""), "malformed_body"),
    "cut in a header": (form(*PAIR, end=b"--xx\r\nContent-Dis"), "malformed_body"),
    "no form": (b"secret", "malformed_body"),
    "empty": (b"", "malformed_body"),
    "no name": (b"--xx\r\n\r\nsecret\r\n--xx--\r\n", "malformed_body"),
    "many headers": (b"--xx\r\n" + b"a: b\r\n" * 10_000 + b"\r\n", "malformed_body"),
    "long prompt": (form(("prompt", b"secret" * 10_000), ("image", b"y")), "invalid_request"),
    "weights of another type": (form(*PAIR, ("weights", b'{"clip": {"secret": 1}}')), "invalid_request"),
    "weights of another shape": (form(*PAIR, ("weights", b'["secret"]')), "invalid_request"),
}


@pytest.mark.parametrize("name", INVALID_FORMS)
def test_invalid_form_is_a_problem(app: FastAPI, name: str) -> None:
    """Each mistake has its code, and nothing of the form is echoed."""
    body, code = INVALID_FORMS[name]
    response = post(app, content=body, headers={"Content-Type": BOUNDARY})
    assert response.json()["code"] == code
    assert response.status_code in (400, 422)
    assert "secret" not in response.text


@pytest.mark.parametrize(
    "content_type", ["multipart/form-data", "multipart/form-data; boundary=" + "x" * 300]
)
def test_form_needs_a_boundary(content_type: str) -> None:
    """A type without a boundary, or with an endless one, is a malformed body."""
    with pytest.raises(MalformedBodyError) as error:
        decode_form(form(*PAIR), content_type)
    assert error.value.syntax


def headed(*headers: bytes, name: bytes = b"prompt", value: bytes = b"a fish") -> bytes:
    """Return a form with one image and a field with further headers."""
    disposition = b'Content-Disposition: form-data; name="%s"' % name
    field = b"--xx\r\n" + b"\r\n".join((disposition, *headers)) + b"\r\n\r\n" + value + b"\r\n"
    return field + form(("image", b"y"))


def refusal_of(body: bytes, content_type: str = BOUNDARY) -> MalformedBodyError:
    with pytest.raises(MalformedBodyError) as error:
        decode_form(body, content_type)
    return error.value


MB = 2**20
#: name -> form, part of its refusal. Each took seconds or gigabytes for each 60 MB.
COSTLY_FORMS: dict[str, tuple[bytes, str]] = {
    "weights": (form(*PAIR, ("weights", b'{"":[]},' * (MB // 8))), "field weights is longer than 8192 bytes"),
    "short weights": (form(*PAIR, ("weights", b'{"":[]}')), "got `array` - at `$.weights[...]`"),
    "evaluators": (form(*PAIR, ("evaluators", b"," * MB)), "field evaluators is longer than 8192 bytes"),
    "short evaluators": (form(*PAIR, ("evaluators", b"," * 8000)), "Expected `array` of length <= 64"),
    "normalization": (form(*PAIR, ("normalization", b"'" * MB)), "field normalization is longer than"),
    "boolean": (form(*PAIR, ("deterministic", b"t" * MB)), "field deterministic is longer than"),
    "prompt": (form(("prompt", b"\xff" * MB), ("image", b"")), "the prompt is longer than 10000 characters"),
    "delimiters in an image": (form(("prompt", b"x"), ("image", b"\r\n--xxz" * MB)), "more than 2053 fields"),
    "delimiters behind the end": (form(*PAIR) + b"\r\n--xx\r\n" * MB, "more than 2053 fields"),
    "padding": (form(*PAIR, end=b"--xx" + b" " * MB + b"\r\n"), "white space after a boundary"),
    "repeated header": (headed(b"Content-Disposition: form-data"), "a field has a header twice"),
    "parameters": (
        b'--xx\r\nContent-Disposition: form-data; name="image"' + b'; "' * 1000 + b"\r\n\r\n\r\n--xx--\r\n",
        "a header has too many parameters",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COSTLY_FORMS)
def test_costly_form_is_refused_early(name: str) -> None:
    """Work and memory for a form are bounded: it is refused before the costly part is decoded."""
    body, detail = COSTLY_FORMS[name]
    assert detail in str(refusal_of(body))


def test_memory_for_options_is_bounded() -> None:
    """A field of a few megabytes needs no more memory than a few copies of the form."""
    body = form(*PAIR, ("weights", b"[" + b'{"":[]},' * (MB // 2) + b"1]"))
    tracemalloc.start()
    try:
        refusal_of(body)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 4 * len(body)


def test_content_type_with_many_parameters_is_refused() -> None:
    """The parameters of the request's own header are bounded too."""
    assert refusal_of(form(*PAIR), BOUNDARY + "; a=b" * 1000).syntax


@pytest.mark.parametrize(
    "headers",
    [
        (b"Content-Type: text/plain; charset=utf-8",),
        (b'content-type: TEXT/PLAIN;charset="UTF-8"', b"Content-Length: 6"),
        (b"Content-Type: text/plain; charset=utf-8", b"Content-Transfer-Encoding: binary"),
        (b"Content-Transfer-Encoding: 8bit",),
    ],
)
def test_headers_of_other_programs_are_accepted(headers: tuple[bytes, ...]) -> None:
    """aiohttp, .NET, okhttp, Dart and Spring label each text; the text is the same."""
    assert decode_form(headed(*headers), BOUNDARY).items[0].prompt == "a fish"


def test_weights_may_be_labelled_as_json() -> None:
    """It is the only field that is JSON."""
    json_type = b"Content-Type: application/json"
    weights = headed(json_type, name=b"weights", value=b'{"clip": 2}')
    request = decode_form(weights.removesuffix(b"--xx--\r\n") + form(("prompt", b"x")), BOUNDARY)
    assert request.weights == {"clip": 2}
    assert "Content-Type" in str(refusal_of(headed(json_type)))


@pytest.mark.parametrize(
    "header",
    [
        b"Content-Type: text/html",
        b"Content-Type: text/plain",
        b"Content-Type: text/plain; charset=latin-1",
        b"Content-Type: text/plain; charset=utf-8; oil on canvas",
        b"Content-Type: multipart/mixed; boundary=yy",
        b"Content-Type:",
        b"Content-Transfer-Encoding: base64",
        b"Content-Transfer-Encoding: Quoted-Printable",
        b"X-Style: oil on canvas",
    ],
)
def test_text_with_other_headers_is_refused(header: bytes) -> None:
    """curl makes them of what follows a `;` in `-F`, so that the text may be cut."""
    refusal = str(refusal_of(headed(header)))
    assert "field prompt has" in refusal
    assert "Transfer-Encoding" in refusal or "--form-string prompt=" in refusal


def test_text_with_a_file_name_is_refused() -> None:
    """curl adds it for `@` and for `; filename=`."""
    body = b'--xx\r\nContent-Disposition: form-data; name="prompt"; filename=""\r\n\r\nx\r\n' + form(
        ("image", b"y")
    )
    assert "field prompt has a file name" in str(refusal_of(body))
