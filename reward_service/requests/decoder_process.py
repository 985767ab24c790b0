"""Child process that decodes image files, one at a time; Pillow and numpy only.

Files and pixels pass through an anonymous file that both processes have open; only small frames pass through
standard input and output, integers little-endian:

    to it:   REQUEST, once the file is there; in answer to SIZE one byte: GO, or STOP to drop the image
    from it: SIZE (bytes of the decoded image), then IMAGE (height, width, lossy), once the pixels are there;
             or ERROR (length), followed by code, newline and message

A decoder that exceeds its CPU time is killed by the kernel (SIGPROF), in whatever code it is. One that is
idle for some seconds may end by itself, so that its memory is free.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import resource
import select
import signal
import struct
import sys
import warnings
from io import FileIO
from pathlib import Path

from PIL import Image

from reward_service.images import ImageError, decode

#: bytes of the file, maximum pixels, CPU seconds of an image, further CPU seconds of each pixel
REQUEST = struct.Struct("<QQdd")
#: kind, two numbers, whether the compression is lossy
REPLY = struct.Struct("<BQQB")
READY, SIZE, IMAGE, ERROR = range(4)
GO, STOP = b"\1", b"\0"

_PR_SET_PDEATHSIG = 1
CHANNELS = 3


class _StoppedError(Exception):
    """The image is not wanted."""


def main() -> None:
    """Decode files until standard input ends.

    Command-line arguments: descriptor of the anonymous file, bytes of memory that decoding may take, niceness
    of the process, and the seconds without a file after which it ends; 0 for never.
    """
    shared, memory_bytes, niceness, idle_s = map(int, sys.argv[1:5])
    _die_with_parent()
    os.nice(niceness)
    # Whatever prints to standard output must not get between the frames.
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    Image.preinit()  # imports the decoders now, not in the time of the first image
    importlib.import_module("PIL.WebPImagePlugin")
    _limit_memory(memory_bytes)
    requests = os.fdopen(0, "rb", buffering=0)
    replies.write(REPLY.pack(READY, 0, 0, 0))
    while select.select([requests], [], [], idle_s or None)[0]:
        header = requests.read(REQUEST.size)
        if len(header) < REQUEST.size:
            return
        _serve(header, shared, requests, replies)


def _serve(header: bytes, shared: int, requests: FileIO, replies: FileIO) -> None:
    size, max_pixels, base_s, pixel_s = REQUEST.unpack(header)

    def reserve(decoded_bytes: int) -> None:
        replies.write(REPLY.pack(SIZE, decoded_bytes, 0, 0))
        if requests.read(1) != GO:
            raise _StoppedError
        signal.setitimer(signal.ITIMER_PROF, base_s + pixel_s * decoded_bytes / CHANNELS)

    signal.setitimer(signal.ITIMER_PROF, base_s)
    try:
        data = bytearray(size)
        read_file(shared, memoryview(data))
        image = decode(bytes(data), max_pixels=max_pixels, reserve=reserve)
    except _StoppedError:
        return
    except ImageError as error:
        text = f"{error.code}\n{error}".encode()
        replies.write(REPLY.pack(ERROR, len(text), 0, 0) + text)
    else:
        height, width, _ = image.rgb.shape
        write_file(shared, image.rgb.data.cast("B"))
        replies.write(REPLY.pack(IMAGE, height, width, image.lossy))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def write_file(number: int, data: bytes | memoryview) -> None:
    """Write the whole of an anonymous file; used by both processes.

    Args:
        number: file descriptor
        data: its content
    """
    rest = memoryview(data)
    while rest:
        rest = rest[os.pwrite(number, rest, len(data) - len(rest)) :]


def read_file(number: int, target: memoryview) -> None:
    """Read the start of an anonymous file; used by both processes.

    Args:
        number: file descriptor
        target: gets the bytes

    Raises:
        EOFError: if the file is shorter
    """
    rest = target
    while rest:
        count = os.preadv(number, [rest], len(target) - len(rest))
        if not count:
            raise EOFError
        rest = rest[count:]


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
