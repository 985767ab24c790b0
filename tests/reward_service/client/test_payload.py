"""What callers have, as bodies of requests: every kind of image, unchanged, limits told beforehand."""

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
from reward_service.client.payload import Encoding, Portions, encode_image, question
from reward_service.images import Pixels, decode
from reward_service.protocol import MAX_BODY_BYTES, MSGPACK, ScoreRequest, decode_request
from tests.support.service.fake_service import PIXELS, Service, client

BATCH = np.stack([PIXELS, PIXELS[::-1], PIXELS // 2])


class Shape(str, enum.Enum):  # noqa: UP042 - StrEnum's str() is its value
    """A str subclass whose str() is not its value."""

    CIRCLE = "a circle"


def requests(
    prompts: Any, images: Any, portions: Portions | None = None, **options: Any
) -> list[ScoreRequest]:
    given = {"evaluators": None, "weights": None, "normalization": "unit"} | options
    asked = question(**given, deterministic=False, allow_partial=False)
    return [
        decode_request(it.body, MSGPACK) for it in (portions or Portions()).chunks(prompts, images, asked)
    ]


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
def test_a_batch_of_any_kind_arrives_unchanged(images: Any) -> None:
    """N images in one array, tensor or iterable are the same N pixels at the service."""
    np.testing.assert_array_equal(sent_pixels(images, 3), BATCH)


def test_floats_are_rounded_once_and_to_the_nearest() -> None:
    """Every level survives its float, in every width that holds it; others go to the nearest."""
    levels = torch.arange(256, dtype=torch.float64).expand(3, 4, 256)
    for kind in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        sent = sent_pixels([(levels / 255).to(kind)], 1)[0][0, :, 0]
        np.testing.assert_array_equal(sent, np.rint((levels / 255).to(kind).double()[0, 0].numpy() * 255))
        if kind != torch.bfloat16:  # whose 8 bits cannot tell all levels apart
            np.testing.assert_array_equal(sent, np.arange(256))
    near = torch.tensor([0.49, 0.51, 1.49, 254.51, 254.49]) / 255
    assert sent_pixels([near.double().expand(3, 2, 5)], 1)[0][0, :, 0].tolist() == [0, 1, 1, 255, 254]


@pytest.mark.parametrize("encoding", ["png", "webp"])
def test_encoded_pixels_are_the_same_and_smaller(encoding: Encoding) -> None:
    """For slow networks: lossless, declared as what they are; files go unchanged whatever the encoding."""
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
    ("image", "words"),
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
        (3.5, "float is no"),
        ({"path": "x.png"}, "dict is no"),
    ],
)
def test_what_may_mean_two_things_is_refused(image: Any, words: str) -> None:
    """Never a guess about channels, ranges or files."""
    with pytest.raises(InputError, match=words):
        encode_image(image)


def test_a_path_may_be_any_path_object(tmp_path: Path) -> None:
    """os.PathLike, as other libraries make them."""

    class Elsewhere(os.PathLike[str]):
        def __fspath__(self) -> str:
            return str(tmp_path / "a.png")

    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    assert encode_image(Elsewhere()).data == (tmp_path / "a.png").read_bytes()


@pytest.mark.parametrize("kind", ["array", "Pillow"])
def test_an_image_beyond_a_request_is_told_before_it_is_sent(kind: str) -> None:
    """Raw pixels beyond 64 MiB name the limit and the ways out; as PNG the same image goes."""
    huge = np.zeros((4800, 4800, 3), np.uint8)
    image = huge if kind == "array" else Image.fromarray(huge)
    service = Service()
    with pytest.raises(InputError, match=r"image 0: 4800x4800 .* 66 MiB raw, .* 64 MiB .*encoding='png'"):
        client(service).score(["x"], [image])
    assert service.requests == []
    assert len(encode_image(image, "png").data) < 1_000_000
    with pytest.raises(InputError, match="WebP ends at 16383"):
        encode_image(np.zeros((2, 16384, 3), np.uint8), "webp")


def test_an_encoded_file_beyond_a_request_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole body counts, prompt included."""
    monkeypatch.setattr(payload, "MAX_BODY_BYTES", 5000)
    file = encode_image(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8), "png").data
    with pytest.raises(InputError, match=r"image 1: .* MiB of a request"):
        requests(["x", "y" * 400], [PIXELS, file], Portions(bytes=1000))


@pytest.mark.parametrize(
    ("prompt", "seen"),
    [(np.str_("a fish"), "a fish"), (Shape.CIRCLE, "a circle"), ("ü" * 10_000, "ü" * 10_000)],
)
def test_prompts_that_are_strings_of_a_kind(prompt: Any, seen: str) -> None:
    """numpy's strings and enumerations are sent as what they hold."""
    assert requests([prompt], [PIXELS])[0].items[0].prompt == seen


def test_prompts_may_be_an_array_of_strings() -> None:
    """A column of a table, as numpy has it; and images as an array of paths are looked for as paths."""
    assert [it.prompt for it in requests(np.array(["a", "bb"]), [PIXELS] * 2)[0].items] == ["a", "bb"]
    with pytest.raises(InputError, match=r"no-such\.png cannot be read"):
        requests(["x"], np.array(["no-such.png"]))


@pytest.mark.parametrize(
    ("prompts", "images", "words"),
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
def test_slips_are_told_in_their_own_words(prompts: Any, images: Any, words: str) -> None:
    """No TypeError from deep inside, and nothing is sent."""
    service = Service()
    with pytest.raises(InputError, match=words):
        client(service).score(prompts, images)
    assert service.requests == []


@pytest.mark.parametrize(
    ("options", "words"),
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
def test_options_without_sense_are_refused(options: Any, words: str) -> None:
    """A string for a list of evaluators would ask for its letters."""
    with pytest.raises(InputError, match=words):
        client(Service()).score(["x"], [PIXELS], **options)


def test_numpys_numbers_are_numbers() -> None:
    """Weights out of an array need no conversion by hand."""
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
def test_a_client_that_cannot_work_is_not_made(options: Any) -> None:
    """Lossy encodings and sizes that the service would refuse are told at once."""
    with pytest.raises(InputError):
        RewardClient("http://judge.invalid", **options)


def test_the_wire_holds_a_raw_image_of_the_largest_size() -> None:
    """The limit that images.py checks is the one that makes a body too large."""
    side = int((MAX_BODY_BYTES / 3) ** 0.5)
    assert requests(["x"], [np.zeros((side, side, 3), np.uint8)])[0].items[0].image.shape == (side, side, 3)
