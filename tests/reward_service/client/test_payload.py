"""Request bodies: every type of image is sent unchanged, and limits are checked before sending."""

from __future__ import annotations

import enum
import io
import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from reward_service.client import AsyncRewardClient, InputError, RewardClient, payload
from reward_service.client.encoding import Encoding, encode_image
from reward_service.client.payload import Chunking, parse_options
from reward_service.images import Pixels, decode
from reward_service.protocol import MAX_BODY_BYTES, MSGPACK, ScoreRequest, decode_request
from tests.support.service.fake_service import PIXELS, FakeService, http_server, make_client

BATCH = np.stack([PIXELS, PIXELS[::-1], PIXELS // 2])


class Shape(str, enum.Enum):  # noqa: UP042 - StrEnum's str() is its value
    """A str subclass whose str() is not its value."""

    CIRCLE = "a circle"


def requests(
    prompts: Any, images: Any, chunking: Chunking | None = None, **options: Any
) -> list[ScoreRequest]:
    arguments = {"evaluators": None, "weights": None, "normalization": "unit"} | options
    parsed = parse_options(**arguments, deterministic=False, allow_partial=False)
    chunks = (chunking or Chunking()).split(prompts, images, parsed)
    return [decode_request(chunk.body, MSGPACK) for chunk in chunks]


def sent_pixels(images: Iterable[Any], count: int) -> list[Pixels]:
    items = requests(["x"] * count, images)[0].items
    return [decode(item.image.data, item.image.format, item.image.shape).rgb for item in items]


@pytest.mark.parametrize(
    "images",
    [
        BATCH,
        BATCH / 255,
        (BATCH / 255).astype(np.float32),
        torch.from_numpy(BATCH).permute(0, 3, 1, 2),
        torch.from_numpy(BATCH),
        torch.from_numpy(BATCH).permute(0, 3, 1, 2) / 255,
        (torch.from_numpy(BATCH).permute(0, 3, 1, 2) / 255).requires_grad_(),
        list(BATCH),
        tuple(BATCH),
        (it for it in BATCH),
        np.array([Image.fromarray(it) for it in BATCH] + [None], dtype=object)[:3],
    ],
    ids=[
        "uint8 array", "float64 array", "float32 array", "uint8 NCHW tensor", "uint8 NHWC tensor",
        "float tensor", "tensor under gradient", "list", "tuple", "generator", "array of objects",
    ],
)  # fmt: skip
def test_batches_of_any_type_are_sent_unchanged(images: Any) -> None:
    """N images in one array, tensor or iterable reach the service as the same pixels."""
    np.testing.assert_array_equal(sent_pixels(images, 3), BATCH)


def test_floats_are_rounded_to_the_nearest_level() -> None:
    """Every level is restored from its float, in each dtype that can hold it; other values are rounded."""
    levels = torch.arange(256, dtype=torch.float64).expand(3, 4, 256)
    for kind in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        sent = sent_pixels([(levels / 255).to(kind)], 1)[0][0, :, 0]
        np.testing.assert_array_equal(sent, np.rint((levels / 255).to(kind).double()[0, 0].numpy() * 255))
        if kind != torch.bfloat16:  # its 8 bits cannot represent all levels
            np.testing.assert_array_equal(sent, np.arange(256))
    near = torch.tensor([0.49, 0.51, 1.49, 254.51, 254.49]) / 255
    assert sent_pixels([near.double().expand(3, 2, 5)], 1)[0][0, :, 0].tolist() == [0, 1, 1, 255, 254]


@pytest.mark.parametrize("encoding", ["png", "webp"])
def test_encoded_pixels_are_lossless_and_smaller(encoding: Encoding) -> None:
    """PNG and WebP are lossless and declared as such; files are sent unchanged with any encoding."""
    smooth = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None, None], (64, 64, 3))
    sent = encode_image(smooth, encoding)
    found = decode(sent.data, sent.format, sent.shape)
    np.testing.assert_array_equal(found.rgb, smooth)
    assert not found.lossy
    assert sent.format == encoding
    assert len(sent.data) < smooth.size / 2
    file = encode_image(smooth, "png").data
    assert encode_image(file, encoding).data == file


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(3, 4, 3, dtype=torch.uint8), "may mean"),
        (torch.zeros(4, 3, 5), r"\(3, height, width\)"),
        (np.full((4, 5, 3), np.nan), r"\[0, 1\]"),
        (np.zeros((4, 5, 4), np.uint8), r"\(height, width, 3\)"),
        (np.zeros((4, 5, 3), np.int64), "uint8"),
        (np.zeros((4, 5, 3), bool), "uint8"),
        (torch.zeros(3, 4, 5, dtype=torch.int32).permute(1, 2, 0), "shape"),
        ("a\0b.png", "cannot be read"),
        (os.curdir, "cannot be read"),
        (3.5, "float is not a Pillow image"),
        ({"path": "x.png"}, "dict is not a Pillow image"),
    ],
)
def test_ambiguous_images_are_refused(image: Any, message: str) -> None:
    """Channels, ranges and files are never guessed."""
    with pytest.raises(InputError, match=message):
        encode_image(image)


def closed_image() -> Image.Image:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    image = Image.open(file)
    image.close()
    return image


def image_with_text_behind_its_pixels() -> Image.Image:
    """Return an opened PNG whose text, which Pillow reads with the pixels, is beyond Pillow's limit."""
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    body = b"zTXtkey\0\0" + zlib.compress(bytes(2_000_000))
    text = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    whole = file.getvalue()
    return Image.open(io.BytesIO(whole[:-12] + text + whole[-12:]))


def released_view() -> memoryview:
    view = memoryview(b"x")
    view.release()
    return view


class BytesPath(os.PathLike[bytes]):
    """Path of bytes."""

    def __fspath__(self) -> bytes:
        return b"/no/such/file.png"


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(3, 4, 5, device="meta"), "tensor cannot be read .*; give a dense tensor"),
        (torch.zeros(3, 4, 5).to_sparse(), "tensor cannot be read"),
        (torch.zeros(3, 4, 5, dtype=torch.complex128).conj().imag, "tensor cannot be read"),
        (torch.zeros(3, 4, 5, dtype=torch.complex64), "complex64"),
        (closed_image(), "Pillow image cannot be read .*closed"),
        (image_with_text_behind_its_pixels(), "Pillow image cannot be read .*too large"),
        (Image.new("RGB", (0, 0)), "no pixels: 0x0"),
        (Image.new("RGB", (0, 5)), "no pixels: 0x5"),
        (Image.new("F", (2, 2)), "mode F has no fixed range"),
        (Image.new("I", (2, 2)), "mode I has no fixed range"),
        (np.ma.masked_array(PIXELS, PIXELS > 9), "masked"),
        (np.full((4, 5, 3), np.float32(1.0000001)), r"in \[0, 1\], not \[1\.0000001"),
        (np.full((4, 5, 3), -1e-9), r"not \[-1e-09"),
        (torch.full((3, 4, 5), 1.0000001), r"not \[1\.0000001"),
        (released_view(), "bytes cannot be read"),
        (BytesPath(), r"/no/such/file\.png.* cannot be read"),
    ],
)  # fmt: skip
def test_images_without_readable_pixels_are_refused_with_their_index(image: Any, message: str) -> None:
    """Errors of torch, numpy and Pillow never come through, and the range in the message is exact."""
    service = FakeService()
    with pytest.raises(InputError, match=f"image 1: .*{message}"):
        make_client(service).score(["a", "b"], [PIXELS, image])
    assert service.requests == []


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_of_a_batch_are_refused_with_their_index() -> None:
    """A batch in one tensor that cannot be read, or whose length is unknown, is an input error too."""
    nested = torch.nested.nested_tensor([torch.zeros(3, 4, 5), torch.zeros(4, 4, 5)])
    quantized = torch.quantize_per_tensor(torch.zeros(2, 3, 4, 5), 0.1, 0, torch.quint8)
    for images, index in ((torch.zeros(2, 3, 4, 5, device="meta"), 0), (nested, 1), (quantized, 0)):
        with pytest.raises(InputError, match=f"image {index}: "):
            make_client(FakeService()).score(["a", "b"], images)


def test_an_image_without_pixels_is_refused_in_every_encoding() -> None:
    """Neither an empty body nor an error of the PNG or WebP encoder."""
    for encoding in ("raw", "png", "webp"):
        with pytest.raises(InputError, match="no pixels"):
            encode_image(Image.new("RGB", (0, 3)), encoding)


def test_premultiplied_pillow_images_are_sent() -> None:
    """Modes La and RGBa, which Pillow cannot convert to RGB in one step, are composited on white."""
    for image in (Image.new("La", (2, 1), (51, 51)), Image.new("RGBa", (2, 1), (51, 51, 51, 51))):
        assert sent_pixels([image], 1)[0].tolist() == [[[255, 255, 255]] * 2]


def test_any_path_like_object_is_a_path(tmp_path: Path) -> None:
    """Other libraries' implementations of os.PathLike are accepted."""

    class Elsewhere(os.PathLike[str]):
        def __fspath__(self) -> str:
            return str(tmp_path / "a.png")

    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    assert encode_image(Elsewhere()).data == (tmp_path / "a.png").read_bytes()


@pytest.mark.parametrize("kind", ["array", "Pillow"])
def test_too_large_images_are_refused_before_sending(kind: str) -> None:
    """Raw pixels above 64 MiB are refused with the limit and a remedy; as PNG the same image is sent."""
    huge = np.zeros((4800, 4800, 3), np.uint8)
    image = huge if kind == "array" else Image.fromarray(huge)
    service = FakeService()
    with pytest.raises(InputError, match=r"image 0: 4800x4800 .* 66 MiB raw, .* 64 MiB .*encoding='png'"):
        make_client(service).score(["x"], [image])
    assert service.requests == []
    assert len(encode_image(image, "png").data) < 1_000_000
    with pytest.raises(InputError, match="the limit of WebP is 16383"):
        encode_image(np.zeros((2, 16384, 3), np.uint8), "webp")


def test_too_large_files_are_refused_before_sending(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit holds for the whole body, including the prompt."""
    monkeypatch.setattr(payload, "MAX_BODY_BYTES", 5000)
    file = encode_image(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8), "png").data
    with pytest.raises(InputError, match=r"image 1: .* MiB of a request"):
        requests(["x", "y" * 400], [PIXELS, file], Chunking(bytes=1000))


@pytest.mark.parametrize(
    ("prompt", "sent"),
    [(np.str_("a fish"), "a fish"), (Shape.CIRCLE, "a circle"), ("ü" * 10_000, "ü" * 10_000)],
)
def test_str_subclasses_are_sent_as_their_value(prompt: Any, sent: str) -> None:
    """numpy strings and members of str enumerations are sent as their text."""
    assert requests([prompt], [PIXELS])[0].items[0].prompt == sent


def test_prompts_may_be_an_array_of_strings() -> None:
    """Prompts may be a numpy array of strings; strings in an array of images are paths."""
    assert [it.prompt for it in requests(np.array(["a", "bb"]), [PIXELS] * 2)[0].items] == ["a", "bb"]
    with pytest.raises(InputError, match=r"no-such\.png cannot be read"):
        requests(["x"], np.array(["no-such.png"]))


@pytest.mark.parametrize(
    ("prompts", "images", "message"),
    [
        (None, [PIXELS], "prompts must be a list, not a NoneType"),
        (["a"], None, "images must be a list, not a NoneType"),
        (["a"] * 4, PIXELS, "not one image"),
        (["a"] * 3, torch.zeros(3, 4, 5), "not one image"),
        (["a"], np.float32(1), "not one image"),
        (["a"], Path("a.png"), "not one image"),
        ({"a": 1}, [PIXELS], "must be a list, not a dict"),
        ({"a"}, [PIXELS], "must be a list, not a set"),
        (b"a", [PIXELS], "one string"),
        (["a" * 10_001], [PIXELS], "10,000 characters"),
        ([float("nan")], [PIXELS], "prompt 0 cannot be sent: it is a float"),
    ],
)
def test_invalid_arguments_have_specific_messages(prompts: Any, images: Any, message: str) -> None:
    """Invalid arguments raise InputError instead of a TypeError from inside, and nothing is sent."""
    service = FakeService()
    with pytest.raises(InputError, match=message):
        make_client(service).score(prompts, images)
    assert service.requests == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluators": "clip"}, "not one string"),
        ({"evaluators": []}, "empty"),
        ({"evaluators": [None]}, "NoneType"),
        ({"weights": {"clip": -1.0}}, "at least 0"),
        ({"weights": {"clip": float("nan")}}, "finite"),
        ({"weights": {"clip": "much"}}, "finite"),
        ({"weights": {"clip": 10**400}}, "finite"),
        ({"weights": {"clip": torch.zeros(2)}}, "finite"),
        ({"weights": [("clip", 1.0)]}, "mapping from names to numbers, not a list"),
        ({"evaluators": 3}, "list of names, not a int"),
        ({"normalization": "percent"}, "unit, z, raw"),
        ({"deadline_s": 0}, "positive"),
        ({"deadline_s": float("nan")}, "positive number of seconds, at most 1,000,000, not nan"),
        ({"deadline_s": float("inf")}, "deadline_s must be"),
        ({"deadline_s": "30"}, "not '30'"),
    ],
)
def test_invalid_options_are_refused(options: Any, message: str) -> None:
    """Invalid options are refused, such as a string for the list of evaluators."""
    with pytest.raises(InputError, match=message):
        make_client(FakeService()).score(["x"], [PIXELS], **options)


def test_weights_may_be_numpy_or_torch_scalars() -> None:
    """Weights from an array need no conversion."""
    request = requests(["x"], [PIXELS], weights={"clip": np.float32(0.5), "hpsv2": torch.tensor(2)})[0]
    assert request.weights == {"clip": 0.5, "hpsv2": 2.0}


NOT_SECONDS = (float("nan"), -1, float("inf"), 1e12, "5", None, True, [1.0], 10**5000)
NOT_COUNTS = (0, -1, 2.5, float("nan"), float("inf"), "5", None, True, 10**5000)


@pytest.mark.parametrize("kind", [RewardClient, AsyncRewardClient])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("encoding", ("jpeg", None, 3)),
        ("timeout_s", (0, *NOT_SECONDS)),
        ("retry_budget_s", NOT_SECONDS),
        ("in_flight", (1025, *NOT_COUNTS)),
        ("chunk_pairs", (1025, *NOT_COUNTS)),
        ("chunk_bytes", (2**40, *NOT_COUNTS)),
    ],
)
def test_invalid_client_settings_are_refused(kind: Any, name: str, values: tuple[Any, ...]) -> None:
    """The constructor refuses what could not work, by name, instead of the first request."""
    for value in values:
        with pytest.raises(InputError, match=name):
            kind("http://service.invalid", **{name: value})


def test_numbers_of_numpy_are_valid_settings() -> None:
    """Settings may come from an array; the largest timeout is one that a socket accepts."""
    service = FakeService()
    options: dict[str, Any] = {
        "timeout_s": np.float32(5),
        "retry_budget_s": np.int64(0),
        "in_flight": np.int64(2),
    }
    assert len(make_client(service, **options).score(["x"], [PIXELS]).results) == 1
    with http_server(service) as url, RewardClient(url, timeout_s=1e6, retry_budget_s=1e6) as client:
        assert len(client.score(["x"], [PIXELS], deadline_s=1e6).results) == 1


@pytest.mark.parametrize("timeout_s", [float("nan"), float("inf"), -1, "5"])
def test_waiting_needs_a_number_of_seconds(timeout_s: Any) -> None:
    """With NaN, the wait would never end."""
    with pytest.raises(InputError, match="timeout_s"):
        make_client(FakeService()).wait_until_ready(timeout_s)


def test_the_largest_raw_image_fits_into_a_request() -> None:
    """The size check of one image agrees with the limit of the body."""
    side = int((MAX_BODY_BYTES / 3) ** 0.5)
    assert requests(["x"], [np.zeros((side, side, 3), np.uint8)])[0].items[0].image.shape == (side, side, 3)
