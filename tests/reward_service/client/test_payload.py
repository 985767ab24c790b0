"""Request bodies: every type of image is sent unchanged, and limits are checked before sending."""

from __future__ import annotations

import enum
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from reward_service.client import InputError, RewardClient, payload
from reward_service.client.encoding import Encoding, encode_image
from reward_service.client.payload import Chunking, parse_options
from reward_service.images import Pixels, decode
from reward_service.protocol import MAX_BODY_BYTES, MSGPACK, ScoreRequest, decode_request
from tests.support.service.fake_service import PIXELS, FakeService, make_client

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
        ({"normalization": "percent"}, "unit, z, raw"),
        ({"deadline_s": 0}, "positive"),
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


@pytest.mark.parametrize(
    "options",
    [
        {"encoding": "jpeg"},
        {"in_flight": 0},
        {"chunk_pairs": 2000},
        {"chunk_bytes": 2**40},
        {"chunk_bytes": 0},
    ],
)
def test_invalid_client_settings_are_refused(options: Any) -> None:
    """Lossy encodings and sizes above the service's limits are refused by the constructor."""
    with pytest.raises(InputError):
        RewardClient("http://service.invalid", **options)


def test_the_largest_raw_image_fits_into_a_request() -> None:
    """The size check of one image agrees with the limit of the body."""
    side = int((MAX_BODY_BYTES / 3) ** 0.5)
    assert requests(["x"], [np.zeros((side, side, 3), np.uint8)])[0].items[0].image.shape == (side, side, 3)
