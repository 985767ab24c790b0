"""Progress bars: bars on a terminal, and in a log a plain line now and then."""

import sys
from collections.abc import Iterator, Sequence
from typing import Never, TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")

LOG_EVERY_S = 30.0
LINE = "{desc}: {n_fmt} of {total_fmt} {unit}s in {elapsed}, {remaining} to go{postfix}"


def progress(
    total: int, what: str, unit: str, *, done: int = 0, shown: bool = True, inner: bool = False
) -> "tqdm[Never]":
    """A bar over `total` units of which some are `done`; call `update(n)`. A context manager.

    A bar that is `inner` to another leaves nothing behind on a terminal. Where standard error is none, bars
    are lines, one every half minute.
    """
    if sys.stderr.isatty():
        return tqdm(total=total, desc=what, unit=unit, initial=done, disable=not shown, leave=not inner)
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        initial=done,
        disable=not shown,
        file=_Lines(sys.stderr),
        mininterval=LOG_EVERY_S,
        miniters=1,
        delay=LOG_EVERY_S,
        bar_format=LINE,
    )


def track(things: Sequence[T], what: str, unit: str, *, shown: bool = True) -> Iterator[T]:
    """The things one by one, with an inner bar."""
    with progress(len(things), what, unit, shown=shown, inner=True) as bar:
        for thing in things:
            yield thing
            bar.update()


class _Lines:
    """A text stream that makes a line of whatever would have overwritten the one before."""

    encoding = "utf-8"

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        line = text.strip()
        if line:
            self._stream.write(line + "\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()
