"""Decoding in child processes: limits, ends and replacements; no image takes the service with it."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reward_service import images
from reward_service.config import ServiceConfig, load_config
from reward_service.images import DecodedImage, ImageError
from reward_service.protocol import MSGPACK, Item, Picture, ScoreRequest, encode
from reward_service.requests import decoding
from reward_service.requests.decoding import (
    FAST,
    LARGE,
    AbandonedError,
    DecoderLane,
    DecodingJob,
    ImageDecoders,
    OverrunError,
    UnavailableError,
    usual_lane,
    usual_seconds,
)
from reward_service.requests.parsing import ParsedRequest, RequestParser


def photo(size: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (size, size, 3), np.uint8))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


PNG = saved(photo(), "PNG")
#: Some seconds of CPU time.
SLOW = saved(Image.fromarray(np.zeros((5000, 5000, 3), np.uint8)), "PNG")
WARNINGS: list[str] = []


@pytest.fixture(scope="module")
def config() -> ServiceConfig:
    return load_config(Path("configs/miniature.yaml"), ["decode_threads=1"])


@pytest.fixture
def decoders(config: ServiceConfig) -> Iterator[ImageDecoders]:
    WARNINGS.clear()
    found = ImageDecoders(config, WARNINGS.append)
    yield found
    found.close()


def decode(
    decoders: ImageDecoders,
    data: bytes,
    lane: DecoderLane = FAST,
    job: DecodingJob | None = None,
    reserve: Callable[[int], None] = lambda _: None,
    declared: str | None = None,
) -> DecodedImage:
    job = job or DecodingJob()
    work = decoders.submit(
        lane, lambda: decoders.decode(lane, job, data, declared, None, reserve), "client", 1.0, 0.0
    )
    return work.result(timeout=240)


def child_of(decoders: ImageDecoders) -> int:
    """Return the process ID of the only child."""
    [process] = decoders._processes
    return process._process.pid


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pixels_are_those_of_a_decoder_in_this_process(decoders: ImageDecoders, kind: str) -> None:
    """Of small images and of large ones, whose memory is released, and again afterwards."""
    for size in (16, 1400, 16):
        data = saved(photo(size), kind)
        found, expected = decode(decoders, data), images.decode(data)
        np.testing.assert_array_equal(found.rgb, expected.rgb)
        assert found.lossy is expected.lossy


def test_refusals_are_those_of_a_decoder_in_this_process(decoders: ImageDecoders) -> None:
    """With code and message; and the process goes on."""
    for data, declared in ((PNG[:-20], None), (b"hello", None), (PNG, "jpeg"), (b"", "png")):
        with pytest.raises(ImageError) as expected:
            images.decode(data, declared)
        with pytest.raises(ImageError) as found:
            decode(decoders, data, declared=declared)
        assert (found.value.code, str(found.value)) == (expected.value.code, str(expected.value))
    decode(decoders, PNG)


def test_refused_reservation_reaches_the_caller(decoders: ImageDecoders) -> None:
    """The image is dropped before it is decoded, and the same process decodes the next one."""
    decode(decoders, PNG)
    before = child_of(decoders)

    def refuse(size: int) -> None:
        raise LookupError(size)

    with pytest.raises(LookupError, match="768"):
        decode(decoders, PNG, reserve=refuse)
    decode(decoders, PNG)
    assert child_of(decoders) == before


def test_overrun_moves_to_the_other_lane(decoders: ImageDecoders, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel ends a decoder that takes longer than usual; its successor works."""
    hasty = dataclasses.replace(FAST, image_s=0.01, pixel_s=0.0)
    monkeypatch.setattr(decoding, "FAST", hasty)
    data = saved(Image.fromarray(np.zeros((1700, 1700, 3), np.uint8)), "PNG")
    with pytest.raises(OverrunError):
        decode(decoders, data, hasty)
    decode(decoders, PNG)
    assert not WARNINGS


def test_hidden_size_moves_to_the_other_lane(decoders: ImageDecoders) -> None:
    """A JPEG whose size is not found near its start; its process goes on, and the lane for it decodes it."""
    plain = saved(Image.fromarray(np.zeros((2500, 2500), np.uint8)), "JPEG")
    hidden = plain[:2] + b"\xff\xfe\x00\x03a" * 500 + plain[2:]
    assert usual_lane(usual_seconds(hidden, None)) is FAST
    decode(decoders, PNG)
    before = child_of(decoders)
    with pytest.raises(OverrunError):
        decode(decoders, hidden)
    assert child_of(decoders) == before
    assert decode(decoders, hidden, LARGE).rgb.shape == (2500, 2500, 3)


def test_image_that_takes_too_long_is_refused(decoders: ImageDecoders) -> None:
    """On the lane of large images the image is at fault, and the operator is told."""
    hasty = dataclasses.replace(LARGE, image_s=0.01, pixel_s=0.0)
    with pytest.raises(ImageError, match="takes too long") as caught:
        decode(decoders, SLOW, hasty)
    assert caught.value.code == "image_too_complex"
    assert len(WARNINGS) == 1
    decode(decoders, PNG, LARGE)


def test_lack_of_memory_is_the_image_s(config: ServiceConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder has only so much memory; the service keeps its own."""
    for name in ("_MEMORY_BYTES", "_MEMORY_PER_PIXEL", "_MEMORY_PER_BYTE"):
        monkeypatch.setattr(decoding, name, 0 if name != "_MEMORY_BYTES" else 2**25)
    decoders = ImageDecoders(config)
    try:
        with pytest.raises(ImageError, match=r"memory|fail") as caught:
            decode(decoders, SLOW, LARGE)
        assert caught.value.code == "image_too_complex"
        decode(decoders, PNG)
    finally:
        decoders.close()


def test_dead_process_is_replaced(decoders: ImageDecoders) -> None:
    """It died between two images: neither is at fault."""
    decode(decoders, PNG)
    dead = child_of(decoders)
    os.kill(dead, signal.SIGKILL)
    np.testing.assert_array_equal(decode(decoders, PNG).rgb, np.asarray(photo()))
    assert child_of(decoders) != dead
    assert not WARNINGS


def test_image_that_kills_two_processes_is_refused(decoders: ImageDecoders) -> None:
    """A crash of a codec costs this image only."""
    with pytest.raises(ImageError, match="makes the decoder fail"):
        decode(decoders, PNG, reserve=lambda _: os.kill(child_of(decoders), signal.SIGSEGV))
    assert len(WARNINGS) == 1
    decode(decoders, PNG)


def test_abandoned_job_ends_its_process(decoders: ImageDecoders) -> None:
    """The client has left: the decoder does not go on, and the thread is free."""
    job = DecodingJob()
    with pytest.raises(AbandonedError):
        decode(decoders, SLOW, LARGE, job, reserve=lambda _: threading.Thread(target=job.end).start())
    with pytest.raises(AbandonedError):
        decode(decoders, PNG, FAST, job)
    decode(decoders, PNG, LARGE)


def test_close_waits_for_no_decoder(decoders: ImageDecoders) -> None:
    """Processes end at once, also in the middle of an image; work that waits is cancelled."""
    busy = threading.Event()
    job = DecodingJob()
    running = decoders.submit(
        LARGE, lambda: decoders.decode(LARGE, job, SLOW, None, None, lambda _: busy.set()), "a", 1.0, 0.0
    )
    queued = decoders.submit(LARGE, lambda: None, "a", 1.0, 0.0)
    assert busy.wait(120)
    pid = child_of(decoders)
    decoders.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(UnavailableError):
        running.result(timeout=120)
    with pytest.raises(CancelledError):
        queued.result(timeout=120)


def test_process_ends_with_its_parent(decoders: ImageDecoders) -> None:
    """Its standard input ends: nobody will ask for an image again."""
    decode(decoders, PNG)
    [process] = decoders._processes
    process._requests.close()
    assert process._process.wait(120) == 0


def test_idle_process_of_large_images_ends(decoders: ImageDecoders) -> None:
    """Its memory is free; the next image starts another one."""
    brief = dataclasses.replace(LARGE, idle_s=1)
    decode(decoders, PNG, brief)
    [process] = decoders._processes
    assert process._process.wait(120) == 0
    np.testing.assert_array_equal(decode(decoders, PNG, brief).rgb, np.asarray(photo()))


def test_process_that_cannot_be_started(decoders: ImageDecoders, monkeypatch: pytest.MonkeyPatch) -> None:
    """No image is at fault; the operator is told."""
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    with pytest.raises(UnavailableError, match="No such file"):
        decode(decoders, PNG)
    assert len(WARNINGS) == 1


def test_processes_are_started_only_for_files(decoders: ImageDecoders) -> None:
    """Raw pixels need none."""
    job = DecodingJob()
    decoders.submit(
        FAST, lambda: decoders.decode(FAST, job, b"123", "raw", (1, 1, 3), lambda _: None), "a", 1.0, 0.0
    ).result(timeout=120)
    assert not decoders._processes


def test_lanes_by_size() -> None:
    """Images of usual sizes take the fast lane, those of 25 megapixels the other."""
    large = saved(Image.new("L", (5000, 5000)), "JPEG")
    assert usual_lane(usual_seconds(PNG, None)) is FAST
    assert usual_lane(usual_seconds(saved(photo(1024), "PNG"), None)) is FAST
    assert usual_lane(usual_seconds(large, None)) is LARGE
    assert usual_lane(usual_seconds(bytes(2**26), "raw")) is FAST


def parsed(config: ServiceConfig, files: list[bytes]) -> tuple[RequestParser, ParsedRequest]:
    parser = RequestParser(config)
    request = ScoreRequest([Item("a", Picture(data)) for data in files])
    return parser, parser.parse(encode(request, MSGPACK), MSGPACK)


def test_slices_are_cut_by_pixels(config: ServiceConfig) -> None:
    """Small images share a slice; a large one has its own, on its lane, however few bytes it has."""
    parser, request = parsed(config, [PNG, PNG, SLOW, SLOW, PNG])
    slices = [(it.items, it.lane.name) for it in parser.slices(request)]
    large = [(range(2, 3), LARGE.name), (range(3, 4), LARGE.name)]
    assert slices == [(range(2), FAST.name), *large, (range(4, 5), FAST.name)]


def test_late_image_leaves_those_behind_it(config: ServiceConfig) -> None:
    """The images before it stay decoded, and its size is reserved once."""
    parser, request = parsed(config, [PNG, PNG, PNG])
    reserved: list[int] = []
    calls: list[int] = []

    def decode_image(sent: Picture, reserve: Callable[[int], None]) -> DecodedImage:
        reserve(768)
        calls.append(1)
        if len(calls) == 2:
            raise OverrunError
        return images.decode(sent.data)

    found = parser.decode(request, range(3), reserved.append, decode_image)
    assert (len(found.images), found.left, found.overrun) == (1, range(1, 3), True)
    assert len(parser.decode(request, found.left, reserved.append, decode_image).images) == 2
    assert reserved == [768] * 3


def test_slice_ends_when_its_time_is_over(config: ServiceConfig) -> None:
    """Whatever its images were expected to take; it always has one image."""
    parser, request = parsed(config, [PNG, PNG, PNG])
    found = parser.decode(request, range(3), limit_s=0.0)
    assert (len(found.images), found.left, found.overrun) == (1, range(1, 3), False)
    found = parser.decode(request, found.left, limit_s=0.0)
    assert (len(found.images), found.left) == (1, range(2, 3))
    assert not parser.decode(request, found.left, limit_s=0.0).left
