"""Child process that decodes image files, one at a time; Pillow and numpy only.

Frames on its standard input and output, all integers little-endian:

    to it:   REQUEST header, then the file; in answer to SIZE one byte: GO, or anything else to drop the image
    from it: REPLY header: SIZE (bytes of the decoded image), then IMAGE (height, width, lossy) followed by
             the pixels; or ERROR (length) followed by code, newline and message

A decoder that exceeds its CPU time is killed by the kernel (SIGPROF), in whatever code it is.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import resource
import signal
import struct
import sys
import warnings
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from reward_service.images import ImageError, decode

#: bytes of the file, maximum pixels, CPU seconds of an image, further CPU seconds of each pixel
REQUEST = struct.Struct("<QQdd")
#: kind, two numbers, whether the compression is lossy
REPLY = struct.Struct("<BQQB")
READY, SIZE, IMAGE, ERROR = range(4)
GO, STOP = b"\1", b"\0"

_PR_SET_PDEATHSIG = 1
_CHANNELS = 3


class _StoppedError(Exception):
    """The image is not wanted."""


def main() -> None:
    """Decode files until standard input ends.

    Command-line arguments: bytes of memory that decoding may take, and the niceness of the process.
    """
    memory_bytes, niceness = map(int, sys.argv[1:3])
    _die_with_parent()
    os.nice(niceness)
    # Whatever prints to standard output must not get between the frames.
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    Image.preinit()  # imports the decoders now, not in the time of the first image
    importlib.import_module("PIL.WebPImagePlugin")
    _limit_memory(memory_bytes)
    requests = sys.stdin.buffer
    replies.write(REPLY.pack(READY, 0, 0, 0))
    while len(header := requests.read(REQUEST.size)) == REQUEST.size:
        _serve(header, requests, replies)


def _serve(header: bytes, requests: BinaryIO, replies: BinaryIO) -> None:
    size, max_pixels, base_s, pixel_s = REQUEST.unpack(header)

    def reserve(decoded_bytes: int) -> None:
        replies.write(REPLY.pack(SIZE, decoded_bytes, 0, 0))
        if requests.read(1) != GO:
            raise _StoppedError
        signal.setitimer(signal.ITIMER_PROF, base_s + pixel_s * decoded_bytes / _CHANNELS)

    signal.setitimer(signal.ITIMER_PROF, base_s)
    try:
        image = decode(requests.read(size), max_pixels=max_pixels, reserve=reserve)
    except _StoppedError:
        return
    except ImageError as error:
        text = f"{error.code}\n{error}".encode()
        _write(replies, REPLY.pack(ERROR, len(text), 0, 0) + text)
    else:
        height, width, _ = image.rgb.shape
        replies.write(REPLY.pack(IMAGE, height, width, image.lossy))
        _write(replies, image.rgb.data.cast("B"))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _write(file: BinaryIO, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _die_with_parent() -> None:
    """Ignore the signals meant for the service, which ends this process itself, and end if it is killed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _limit_memory(allowance_bytes: int) -> None:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        soft = pages * resource.getpagesize() + allowance_bytes
        soft = soft if hard == resource.RLIM_INFINITY else min(soft, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    except (OSError, ValueError):
        return  # macOS has no such limit


if __name__ == "__main__":
    main()
