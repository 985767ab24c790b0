"""Problems: short, and without anything of the request, whatever was sent in whatever place."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any, get_args

import httpx
import msgspec
import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_service.config import ServiceConfig
from reward_service.engine.engine import RewardEngine
from reward_service.images import Pixels
from reward_service.protocol import (
    JSON,
    MAX_DETAIL_CHARS,
    MSGPACK,
    ImageFormat,
    Item,
    MalformedBodyError,
    Normalization,
    Picture,
    ProblemError,
    ProblemItem,
    ScoreRequest,
    decode_request,
)
from reward_service.requests.forms import OPTIONS
from reward_service.web.app import create_app
from tests.support.service.serving import http_client, png, ready_service, wait_until

MARK = "Zk4Qx9"
ANY = settings(max_examples=80, deadline=None)
# Quotation marks of every kind, and pieces of the messages that are cut out of msgspec's.
PIECES = (
    "'",
    '"',
    "`",
    "\\",
    "\n",
    "\0",
    "é",
    "😀",
    " ",
    ".",
    "$",
    " - at `$.items[1]`",
    "` - at `$",
    "(byte 1)",
    "enum",
)
TEXTS = st.lists(st.sampled_from(PIECES) | st.characters(codec="utf-8"), max_size=8).map("".join)
MARKED = st.tuples(TEXTS, TEXTS).map(MARK.join)
VALUES = MARKED | MARKED.map(lambda text: [text]) | MARKED.map(lambda text: {text: text})

Path = tuple[str | int, ...]
#: Every place of a request that has a value.
PLACES: list[Path] = [
    *[(name,) for name in ScoreRequest.__struct_fields__],
    ("items", 0),
    *[("items", 0, name) for name in Item.__struct_fields__],
    *[("items", 0, "image", name) for name in Picture.__struct_fields__],
    *[("items", 0, "image", "shape", index) for index in range(3)],
    ("evaluators", 0),
    ("weights", "clip"),
]
#: Every place that has keys.
MAPS: list[Path] = [(), ("items", 0), ("items", 0, "image"), ("weights",)]


@pytest.fixture(scope="module")
def app(config: ServiceConfig, engine: RewardEngine) -> Iterator[FastAPI]:
    with ready_service(config, engine) as service:
        yield create_app(config, service)


def post(app: FastAPI, body: bytes, headers: dict[str, Any], path: str = "/v1/score") -> httpx.Response:
    async def exchange() -> httpx.Response:
        async with http_client(app) as client:
            return await client.post(path, content=body, headers=headers)

    return asyncio.run(exchange())


def check_problem(response: httpx.Response) -> None:
    """Verify that a refusal is short and contains no part of the request."""
    assert response.status_code >= 400
    assert len(response.content) < 2000
    problem = response.json()
    assert problem["detail"]
    assert MARK not in json.dumps(problem)
    assert MARK not in repr(response.headers)


def request_with(path: Path, change: Callable[[Any, str | int], None]) -> dict[str, Any]:
    """Return a request whose image is invalid, after a change of the container at `path[:-1]`."""
    image = {"data": "eHh4", "format": "raw", "shape": [1, 1, 3]}
    body: dict[str, Any] = {
        "items": [{"prompt": "x", "image": image}, {"prompt": "x", "image": {"data": "eHh4"}}],
        "evaluators": ["clip"],
        "weights": {"clip": 1},
        "normalization": "z",
        "allow_partial": False,
        "deterministic": False,
    }
    container: Any = body
    for step in path[:-1]:
        container = container[step]
    change(container, path[-1])
    return body


@ANY
@given(path=st.sampled_from(PLACES), value=VALUES, packed=st.booleans())
def test_no_value_is_echoed(app: FastAPI, path: Path, value: Any, packed: bool) -> None:
    """Text with quotation marks of all kinds in any place of JSON or msgpack, where it belongs or not."""
    body = request_with(path, lambda container, key: container.__setitem__(key, value))
    check_problem(post(app, encoded(body, packed), {"Content-Type": MSGPACK if packed else JSON}))


@ANY
@given(path=st.sampled_from(MAPS), key=MARKED, packed=st.booleans())
def test_no_key_is_echoed(app: FastAPI, path: Path, key: str, packed: bool) -> None:
    """Unknown fields, and evaluators that do not exist."""
    body = request_with((*path, key), lambda container, _: container.__setitem__(key, 1))
    check_problem(post(app, encoded(body, packed), {"Content-Type": MSGPACK if packed else JSON}))


@ANY
@given(body=st.data(), packed=st.booleans())
def test_no_broken_body_is_echoed(app: FastAPI, body: st.DataObject, packed: bool) -> None:
    """A body that is cut, or has marked bytes in any position."""
    whole = encoded(request_with(("normalization",), lambda *_: None), packed)
    cut = body.draw(st.integers(0, len(whole)))
    marked = body.draw(MARKED).encode()
    broken = whole[:cut] + marked + whole[body.draw(st.integers(cut, len(whole))) :]
    check_problem(post(app, broken, {"Content-Type": MSGPACK if packed else JSON}))


@ANY
@given(
    name=st.sampled_from(("prompt", "image", *OPTIONS))
    | MARKED.filter(lambda text: not {'"', "\n", "\r"} & {*text}),
    value=MARKED,
    header=st.sampled_from(
        ("", "Content-Type: ", "Content-Transfer-Encoding: ", "X-", f"Content-Disposition: {MARK}")
    ),
)
def test_no_form_is_echoed(app: FastAPI, name: str, value: str, header: str) -> None:
    """Names, values and headers of fields."""
    line = f"{header}{MARK}: '{MARK}'\r\n" if header else ""
    parts = [
        f'--xx\r\nContent-Disposition: form-data; name="{name}"\r\n{line}\r\n{value}\r\n',
        '--xx\r\nContent-Disposition: form-data; name="image"\r\n\r\nx\r\n--xx--\r\n',
    ]
    body = "".join(parts).encode()
    check_problem(post(app, body, {"Content-Type": "multipart/form-data; boundary=xx"}))


@pytest.mark.parametrize(
    "header", ["Content-Type", "Content-Encoding", "X-Deadline-Ms", "X-Client-Id", "Content-Length"]
)
@pytest.mark.parametrize("quote", ["'", '"', "`", ""])
def test_no_header_is_echoed(app: FastAPI, header: str, quote: str) -> None:
    """Headers that are refused, and an address that does not exist."""
    sent = f"{quote} {MARK}{quote}"
    body = encoded(request_with(("normalization",), lambda *_: None), packed=False)
    response = post(app, body, {"Content-Type": JSON, header: sent})
    check_problem(response)
    check_problem(post(app, body, {"Content-Type": f"multipart/form-data; boundary={sent}"}))
    check_problem(post(app, body, {"Content-Type": JSON}, f"/{MARK}{quote}?{MARK}"))


@pytest.mark.parametrize("quote", ["'", '"', "`", "\u0007", "😀"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("path", PLACES, ids=str)
def test_long_value_gets_a_short_problem(app: FastAPI, path: Path, packed: bool, quote: str) -> None:
    """Of a megabyte, nothing is sent back."""
    value = (quote + MARK) * 100_000
    body = request_with(path, lambda container, key: container.__setitem__(key, value))
    kind = MSGPACK if packed else JSON
    check_problem(post(app, encoded(body, packed), {"Content-Type": kind}))


def encoded(body: dict[str, Any], packed: bool) -> bytes:
    """Return a request as msgpack, with the images' bytes, or as JSON."""
    if not packed:
        return json.dumps(body).encode()
    try:
        for item in body["items"]:
            item["image"]["data"] = base64.b64decode(item["image"]["data"], validate=True)
    except (TypeError, KeyError, ValueError):
        pass  # an image that is something else
    return msgspec.msgpack.encode(body)


@pytest.mark.parametrize("code", ["scoring_failed", "invalid_request"])
def test_details_are_cut(code: str) -> None:
    """In one place, for every problem."""
    item = ProblemItem(code, "y" * 5000, 3)
    problem = ProblemError(code, "x" * 5000, [item]).to_problem("id")
    assert len(problem.detail) == len(problem.errors[0].detail) == MAX_DETAIL_CHARS
    assert ProblemError(code, "short", [ProblemItem(code, "short", 3)]).to_problem("id").detail == "short"


def test_reason_of_a_failed_pair_is_not_sent(
    config: ServiceConfig, engine: RewardEngine, images: list[Pixels], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception in the engine may quote the prompt; the problem has the index only."""

    def fail(pairs: Any, *_: Any, **__: Any) -> Any:
        raise ValueError(f"cannot score {pairs[-1].prompt!r}")

    data = base64.b64encode(png(images[0])).decode()
    body = json.dumps({"items": [{"prompt": f"it's {MARK}", "image": {"data": data}}]}).encode()
    with ready_service(config, engine) as service:
        monkeypatch.setattr(engine, "score", fail)
        response = post(create_app(config, service), body, {"Content-Type": JSON})
        monkeypatch.undo()
    assert response.json()["code"] == "scoring_failed"
    check_problem(response)


FILLER = b"x" * 2**20
FORM = "multipart/form-data; boundary=xx"
WEIGHTS_FIELD = b'--xx\r\nContent-Disposition: form-data; name="weights"\r\n\r\n'
#: kind -> content type, a large body that is refused
REFUSED: dict[str, tuple[str, bytes]] = {
    "JSON": (JSON, b'{"items": [], "x": "' + FILLER + b'"}'),
    "cut JSON": (JSON, b'{"items": [{"prompt": "' + FILLER),
    "an image": (MSGPACK, msgspec.msgpack.encode({"items": [{"prompt": "x", "image": {"data": FILLER}}]})),
    "msgpack": (MSGPACK, msgspec.msgpack.encode({"items": [{"prompt": FILLER.decode()}]})),
    "a form": (FORM, WEIGHTS_FIELD + FILLER + b"\r\n--xx--\r\n"),
    "no form": (FORM, FILLER),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_body_is_released_at_once(app: FastAPI, name: str) -> None:
    """No reference cycle keeps it until the next garbage collection, which may be far away."""
    kind, body = REFUSED[name]

    async def send() -> None:
        async with http_client(app) as client:
            response = await client.post("/v1/score", content=body, headers={"Content-Type": kind})
            assert response.status_code in (400, 422)

    asyncio.run(send())  # whatever is kept for later requests
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        asyncio.run(send())
        # The decoder's thread may still be about to forget it.
        wait_until(lambda: tracemalloc.get_traced_memory()[0] < len(FILLER) // 2, "the release")
    finally:
        tracemalloc.stop()
        gc.enable()


@pytest.mark.parametrize("packed", [False, True])
def test_messages_name_what_is_expected(packed: bool) -> None:
    """Without the value, the message has the place and the choices; line ends do not pass for a choice."""
    kind = MSGPACK if packed else JSON

    def refusal(path: Path, value: Any) -> MalformedBodyError:
        body = request_with(path, lambda container, key: container.__setitem__(key, value))
        with pytest.raises(MalformedBodyError) as error:
            decode_request(encoded(body, packed), kind)
        return error.value

    for wrong in ("bmp", "png\n", "PNG", "", "pngx", 5):
        error = refusal(("items", 1, "image", "format"), wrong)
        expected = "Expected png or jpeg or webp or raw - at `$.items[1].image.format`"
        assert (str(error), error.index, error.syntax) == (expected, 1, False)
    assert str(refusal(("normalization",), "Z")) == "Expected unit or z or raw - at `$.normalization`"
    assert str(refusal(("items", 0, "image", "shape", 2), 4)) == "Expected 3 - at `$.items[0].image.shape[2]`"
    unknown = refusal(("items", 0, "image", "x` - at `$.items[1]"), 1)
    assert str(unknown).startswith("Object contains unknown field; expected data, format, shape - at")
    assert unknown.index == 0


@pytest.mark.parametrize("kind", [JSON, MSGPACK])
def test_choices_are_those_of_the_types(kind: str) -> None:
    """Each value of the literals is accepted, as the schema says."""
    codec: Any = msgspec.msgpack if kind == MSGPACK else msgspec.json
    for format_ in (*get_args(ImageFormat), None):
        for normalization in get_args(Normalization):
            request = ScoreRequest([Item("x", Picture(b"y", format_))], normalization=normalization)
            assert decode_request(codec.encode(request), kind) == request


def keyed(count: int, key: str, value: bytes) -> bytes:
    """Return a msgpack map of equal keys."""
    return b"\xdf" + count.to_bytes(4) + (msgspec.msgpack.encode(key) + value) * count


PACKED_ITEM = msgspec.msgpack.encode({"prompt": "x", "image": {"data": b""}})
ONE_ITEM = b"\x91" + PACKED_ITEM
IMAGE_OF_ONE_ITEM = b"\x81\xa5items\x91\x82\xa6prompt\xa1x\xa5image"
MANY = 2**18
#: name -> msgpack with duplicate keys of more than a megabyte, index of the item at fault
DUPLICATES: dict[str, tuple[bytes, int | None]] = {
    "items": (keyed(MANY, "items", ONE_ITEM), None),
    "prompt": (b"\x81\xa5items\x92" + PACKED_ITEM + keyed(MANY, "prompt", b"\xa1x"), 1),
    "image": (b"\x81\xa5items\x91" + keyed(MANY, "image", b"\x80"), 0),
    "data": (IMAGE_OF_ONE_ITEM + keyed(MANY, "data", b"\xc4\x00"), 0),
    "shape": (IMAGE_OF_ONE_ITEM + keyed(MANY, "shape", b"\x93\x01\x01\x03"), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", DUPLICATES)
def test_many_duplicate_keys_are_refused(name: str) -> None:
    """msgspec would decode each value: half a second for 60 MB in which no other thread runs."""
    body, index = DUPLICATES[name]
    with pytest.raises(MalformedBodyError, match="duplicate or unknown keys") as error:
        decode_request(body, MSGPACK)
    assert error.value.index == index


@pytest.mark.parametrize("field", ["prompt", "image"])
def test_large_msgpack_is_decoded_as_a_small_one(field: str) -> None:
    """Above a megabyte, where duplicate keys are refused first, results and messages are the same."""
    items = [Item("x", Picture(bytes(2**19), "raw", (1, 2, 3))), Item("y", Picture(bytes(2**20)))]
    request = ScoreRequest(items, ["clip"], {"clip": 1.0}, "z", allow_partial=True, deterministic=True)
    assert decode_request(msgspec.msgpack.encode(request), MSGPACK) == request
    body = msgspec.to_builtins(request, builtin_types=(bytes,))
    body["items"][1][field] = 5
    with pytest.raises(MalformedBodyError, match=rf"got `int` - at `\$.items\[1\].{field}`") as error:
        decode_request(msgspec.msgpack.encode(body), MSGPACK)
    assert error.value.index == 1
    del body["items"][1][field]
    with pytest.raises(MalformedBodyError, match=rf"required field `{field}` - at `\$.items\[1\]`"):
        decode_request(msgspec.msgpack.encode(body), MSGPACK)
