"""Image decoding for many clients at once: each file in a child process that can be ended. No torch.

A decoder cannot be interrupted, and a file of some kilobytes can keep it busy for long. Files are therefore
decoded in processes with a limit of CPU time and memory for each image. They take turns in two lanes:

- `fast`: images that usually take up to a tenth of a second. One that takes several times as long as usual is
  stopped and decoded again on the other lane, so that the images behind it do not wait.
- `large`: all others, at a lower priority of the operating system.

Raw pixels need no decoding and are checked in this process.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TypeVar, cast

import numpy as np

import reward_service
from reward_service import images
from reward_service.config import ServiceConfig
from reward_service.image_files import ImageError, detect_format, stated_size, too_complex
from reward_service.images import DecodedImage
from reward_service.requests import decoder_process as child
from reward_service.scheduler.workers import FairWorkers

Result = TypeVar("Result")
Reserve = Callable[[int], None]

_IMAGE_S, _PIXEL_S, _BYTE_S = 2e-4, 3e-8, 5e-9
_RAW_S = 3e-5
_FAST_S = 0.1
_WARN_LENGTH = 200
_KEPT_BYTES = 2**22
_STUCK_S = 300.0
_MEETING_S = 5.0
_MEMORY_BYTES, _MEMORY_PER_PIXEL, _MEMORY_PER_BYTE = 2**28, 64, 4
# Without threads of the linear algebra library, which nothing here uses; large blocks go back to the system.
_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**22),
    "MALLOC_TRIM_THRESHOLD_": str(2**24),
}


class AbandonedError(Exception):
    """The work is not wanted any more."""


class OverrunError(Exception):
    """An image takes much longer to decode than others of its size."""


class UnavailableError(Exception):
    """No image can be decoded at present."""


class _DiedError(Exception):
    """A child process has ended; `status` is its exit status, negative for a signal."""

    def __init__(self, status: int) -> None:
        super().__init__(f"exit status {status}")
        self.status = status


@dataclass(frozen=True)
class DecoderLane:
    """Kind of decoders.

    Attributes:
        name: prefix of the threads' names
        image_s: CPU seconds that an image may take
        pixel_s: further CPU seconds per pixel
        niceness: of the processes
        idle_s: seconds without an image after which a process ends; 0 for never
    """

    name: str
    image_s: float
    pixel_s: float
    niceness: int
    idle_s: int


FAST = DecoderLane("decode", image_s=0.2, pixel_s=4 * _PIXEL_S, niceness=0, idle_s=0)
LARGE = DecoderLane("decode-large", image_s=1.0, pixel_s=8 * _PIXEL_S, niceness=5, idle_s=5)


def usual_seconds(data: bytes, declared_format: str | None) -> float:
    """Return how long the decoding of an image usually takes, from its size in bytes and in pixels."""
    if declared_format == "raw":
        return _RAW_S
    width, height = stated_size(data) or (0, 0)
    return _file_seconds(width * height, len(data))


def _file_seconds(pixels: int, size_bytes: int) -> float:
    return _IMAGE_S + _PIXEL_S * pixels + _BYTE_S * size_bytes


def usual_lane(seconds: float) -> DecoderLane:
    """Return the lane for images that usually take so long."""
    return FAST if seconds <= _FAST_S else LARGE


class DecodingJob:
    """Decoding for one request; ends what is decoded for it when its client leaves."""

    def __init__(self) -> None:
        self.abandoned = False
        self._lock = threading.Lock()
        self._busy: set[DecoderProcess] = set()

    def abandon(self) -> None:
        """Start no further image."""
        self.abandoned = True

    def end(self) -> None:
        """Abandon the job, and end the processes that still work for it."""
        with self._lock:
            self.abandoned = True
            for process in self._busy:
                process.kill()

    @contextmanager
    def using(self, process: DecoderProcess) -> Iterator[None]:
        """Let `end` end a process while the context lasts.

        Raises:
            AbandonedError: if the job is abandoned
        """
        with self._lock:
            if self.abandoned:
                raise AbandonedError
            self._busy.add(process)
        try:
            yield
        finally:
            with self._lock:
                self._busy.discard(process)


class DecoderProcess:
    """Child process that decodes files, seen from the service; used by one thread, but ended by any.

    Args:
        memory_bytes: memory that decoding may take
        lane: its lane

    Raises:
        OSError: if it cannot be started
    """

    def __init__(self, memory_bytes: int, lane: DecoderLane) -> None:
        root = str(Path(reward_service.__file__).resolve().parents[1])
        path = os.pathsep.join([root, *(entry for entry in sys.path if Path(entry).is_absolute())])
        self._shared = _anonymous_file()
        numbers = (self._shared, memory_bytes, lane.niceness, lane.idle_s)
        self._process = subprocess.Popen(
            [sys.executable, "-m", child.__name__, *map(str, numbers)], pass_fds=[self._shared],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, cwd="/", start_new_session=True,
            env=os.environ | _ENVIRONMENT | {"PYTHONPATH": path},
        )  # fmt: skip
        self._requests, self._replies = (
            cast("FileIO", pipe) for pipe in (self._process.stdin, self._process.stdout)
        )
        self._ready, self._between_images = False, True
        self._lock = threading.Lock()

    def decode(self, data: bytes, max_pixels: int, lane: DecoderLane, reserve: Reserve) -> DecodedImage:
        """Decode one file; the arguments are those of `images.decode`.

        Raises:
            ImageError: the image is refused
            OverrunError: the image is too large for the lane, whatever its size was thought to be
            _DiedError: the process has ended
        """
        with self._lock:
            try:
                return self._decode(data, max_pixels, lane, reserve)
            except (BrokenPipeError, EOFError):
                self.kill()
                raise _DiedError(self._process.wait()) from None
            finally:
                if not self._between_images:
                    self.kill()

    def kill(self) -> None:
        """End the process at once; may be called at any time."""
        self._process.kill()

    def close(self) -> None:
        """End the process and release its resources."""
        self.kill()
        self._process.wait()
        with self._lock:  # a thread that uses the process finds its end at once
            if not self._requests.closed:
                os.close(self._shared)
            self._requests.close()
            self._replies.close()

    def _decode(self, data: bytes, max_pixels: int, lane: DecoderLane, reserve: Reserve) -> DecodedImage:
        if not self._ready:
            self._receive()
            self._ready = True
        self._between_images = False
        child.write_file(self._shared, data)
        self._requests.write(child.REQUEST.pack(len(data), max_pixels, lane.image_s, lane.pixel_s))
        kind, size, width, lossy = self._receive()
        if kind == child.SIZE:
            try:
                # The size that the decoder has found can be another than the one stated near the start.
                if usual_lane(_file_seconds(size // child.CHANNELS, len(data))) is LARGE and lane is FAST:
                    raise OverrunError
                reserve(size)
            except BaseException:
                self._requests.write(child.STOP)
                self._between_images = True
                raise
            self._requests.write(child.GO)
            kind, size, width, lossy = self._receive()
        if kind == child.IMAGE:
            rgb = np.empty((size, width, 3), np.uint8)
            child.read_file(self._shared, rgb.data.cast("B"))
            self._free()
            self._between_images = True
            return DecodedImage(rgb, bool(lossy))
        text = self._replies.read(size)
        self._free()
        self._between_images = True
        code, _, message = text.decode().partition("\n")
        raise ImageError(code, message)

    def _receive(self) -> tuple[int, int, int, int]:
        poll = select.poll()
        poll.register(self._replies, select.POLLIN)
        if not poll.poll(_STUCK_S * 1000):
            raise EOFError
        header = self._replies.read(child.REPLY.size)
        if len(header) < child.REPLY.size:
            raise EOFError
        kind, first, second, lossy = child.REPLY.unpack(header)
        return kind, first, second, lossy

    def _free(self) -> None:
        """Release the memory of a large image."""
        if os.fstat(self._shared).st_size > _KEPT_BYTES:
            os.ftruncate(self._shared, 0)


class ImageDecoders:
    """Decoder threads that share their time fairly among clients, each with a child process of its own.

    A child process is started when the first file needs it, and replaced when it has ended.

    Args:
        config: number of threads of each lane, and the limits of an image
        on_warning: called with one line when a process had to be ended, or has ended by itself
    """

    def __init__(self, config: ServiceConfig, on_warning: Callable[[str], None] = lambda _: None) -> None:
        limits = config.limits
        self._max_pixels = limits.max_image_pixels
        self._memory_bytes = (
            _MEMORY_BYTES + _MEMORY_PER_PIXEL * self._max_pixels + _MEMORY_PER_BYTE * limits.max_body_bytes
        )
        self._on_warning = on_warning
        self._threads = config.decode_threads
        self._lanes = {lane.name: FairWorkers(self._threads, lane.name) for lane in (FAST, LARGE)}
        self._local = threading.local()
        self._lock = threading.Lock()
        self._processes: set[DecoderProcess] = set()
        self._closed = False

    def submit(
        self, lane: DecoderLane, run: Callable[[], Result], client: str, weight: float, cost_s: float
    ) -> Future[Result]:
        """Queue work for a thread of a lane, which may call `decode`; see `FairWorkers.submit`."""
        return self._lanes[lane.name].submit(run, client=client, weight=weight, cost_s=cost_s)

    def start(self) -> None:
        """Start the processes of the fast lane, each on its own thread, and return at once."""
        meeting = threading.Barrier(self._threads)

        def start() -> None:
            with suppress(threading.BrokenBarrierError, UnavailableError):
                meeting.wait(_MEETING_S)
                self._process(FAST)

        for _ in range(self._threads):
            self.submit(FAST, start, "", 1.0, 0.0)

    def decode(
        self,
        lane: DecoderLane,
        job: DecodingJob,
        data: bytes,
        declared_format: str | None,
        shape: tuple[int, int, int] | None,
        reserve: Reserve,
    ) -> DecodedImage:
        """Decode one image; call it on a thread of the lane.

        Args:
            lane: the lane
            job: the request that the image belongs to
            data: as for `images.decode`
            declared_format: as for `images.decode`
            shape: as for `images.decode`
            reserve: as for `images.decode`, but called at most once for each process that gets the image

        Raises:
            ImageError: not a valid image, or one that takes too long to decode
            OverrunError: the image is to be decoded on lane `LARGE`
            AbandonedError: the job is abandoned
            UnavailableError: no process can be started, or the decoders are closed
        """
        found = None if declared_format == "raw" or shape is not None else detect_format(data)
        if found is None or declared_format not in (None, found):
            return images.decode(data, declared_format, shape, self._max_pixels, reserve)
        try:
            return self._decode_file(lane, job, data, reserve)
        except _DiedError as error:
            return self._after_death(error, lane, job, data, reserve)

    def close(self) -> None:
        """End all processes and threads at once."""
        with self._lock:
            self._closed = True
            processes, self._processes = self._processes, set()
        for workers in self._lanes.values():
            workers.close()
        for process in processes:
            process.close()

    def _after_death(
        self, error: _DiedError, lane: DecoderLane, job: DecodingJob, data: bytes, reserve: Reserve
    ) -> DecodedImage:
        """Try again if the image need not be the cause."""
        if error.status == -signal.SIGPROF:
            raise self._overrun(lane)
        try:
            return self._decode_file(lane, job, data, reserve)
        except _DiedError as second:
            if second.status == -signal.SIGPROF:
                raise self._overrun(lane) from None
            self._on_warning(f"two decoders have died of one image ({second}); it is refused")
            raise too_complex("decoding the image makes the decoder fail") from None

    def _overrun(self, lane: DecoderLane) -> Exception:
        if lane is FAST:
            return OverrunError()
        self._on_warning("the decoding of an image took too much CPU time and was ended; it is refused")
        return too_complex("decoding the image takes too long")

    def _decode_file(
        self, lane: DecoderLane, job: DecodingJob, data: bytes, reserve: Reserve
    ) -> DecodedImage:
        if job.abandoned:
            raise AbandonedError
        process = self._process(lane)
        try:
            with job.using(process):
                return process.decode(data, self._max_pixels, lane, reserve)
        except _DiedError:
            self._drop(process)
            if job.abandoned:
                raise AbandonedError from None
            raise

    def _process(self, lane: DecoderLane) -> DecoderProcess:
        """Return the process of this thread, which is started if there is none."""
        process: DecoderProcess | None = getattr(self._local, "process", None)
        if process is not None:
            return process
        try:
            process = DecoderProcess(self._memory_bytes, lane)
        except OSError as error:
            reason = (error.strerror or str(error))[:_WARN_LENGTH]
            self._on_warning(f"no image can be decoded: a process cannot be started ({reason})")
            raise UnavailableError(f"a decoder cannot be started ({reason})") from None
        with self._lock:
            if not self._closed:
                self._processes.add(process)
        if self._closed:
            process.close()
            raise UnavailableError("the service is shutting down")
        self._local.process = process
        return process

    def _drop(self, process: DecoderProcess) -> None:
        """Release a process that has ended."""
        self._local.process = None
        with self._lock:
            self._processes.discard(process)
        process.close()


def _anonymous_file() -> int:
    """Return the descriptor of a new file in memory, or of a deleted one where there are none (macOS)."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("image")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
