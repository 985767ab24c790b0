"""Progress bars on a terminal, plain progress lines in a log."""

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
    """Return a progress bar as a context manager; advance it with `update(n)`.

    If standard error is not a terminal, a line is written every `LOG_EVERY_S` seconds instead.

    Args:
        total: number of units
        what: description before the bar
        unit: name of one unit
        done: units already completed
        shown: False for a silent bar
        inner: the bar is nested in another one and is removed from the terminal at its end
    """
    if sys.stderr.isatty():
        return tqdm(total=total, desc=what, unit=unit, initial=done, disable=not shown, leave=not inner)
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        initial=done,
        disable=not shown,
        file=_LineStream(sys.stderr),
        mininterval=LOG_EVERY_S,
        miniters=1,
        delay=LOG_EVERY_S,
        bar_format=LINE,
    )


def track(items: Sequence[T], what: str, unit: str, *, shown: bool = True) -> Iterator[T]:
    """Iterate over the items with an inner progress bar."""
    with progress(len(items), what, unit, shown=shown, inner=True) as bar:
        for item in items:
            yield item
            bar.update()


class _LineStream:
    """Text stream that writes each update of a bar as a line of its own, without carriage returns."""

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
