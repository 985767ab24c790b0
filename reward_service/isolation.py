"""Running a batch so that what is wrong with one pair stays with it. No threads, no clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from reward_service.faults import FatalDeviceError, OutOfMemoryError
from reward_service.pacing import BatchSize

Unit = TypeVar("Unit")
Result = TypeVar("Result")


def run_isolated(
    units: Sequence[Unit],
    run: Callable[[Sequence[Unit]], Sequence[Result]],
    wanted: Callable[[Unit], bool],
    sizes: BatchSize,
    on_oom: Callable[[int], None] = lambda _: None,
) -> Iterator[tuple[Sequence[Unit], Sequence[Result] | Exception]]:
    """Run a batch; halve what fails until the units at fault are alone.

    One bad unit among n costs at most 2·log2(n) further runs. When memory runs out, ``sizes`` is told and
    later parts keep to it.

    :param wanted: asked before each run; what is no longer wanted is left out
    :returns: parts with their results, and single units with their errors, as they come
    :raises FatalDeviceError: as ``run`` raised it
    """
    before, fitted, alone = sizes.now, False, False
    parts = [units]
    while parts:
        part = [unit for unit in parts.pop() if wanted(unit)]
        if not part:
            continue
        if len(part) > sizes.now:
            parts += _halves(part)
            continue
        try:
            results = _checked(part, run(part))
        except FatalDeviceError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a model raises belongs to a unit, not to us
            memory = isinstance(error, OutOfMemoryError)
            if memory:
                on_oom(len(part))
                sizes.overflows(len(part))
            if len(part) > 1:
                parts += _halves(part)
                continue
            if memory:
                alone = True
                sizes.blame_pair(before)
            yield part, error
            continue
        fitted = True
        sizes.fits(len(part))
        yield part, results
    if alone and not fitted:  # no pair fits: the device's memory, not the pairs
        sizes.blame_pair(max(1, before // 2))


def _halves(part: Sequence[Unit]) -> list[Sequence[Unit]]:
    """The later half first: parts are taken from the end."""
    middle = (len(part) + 1) // 2
    return [part[middle:], part[:middle]]


def _checked(part: Sequence[Unit], results: Sequence[Result]) -> Sequence[Result]:
    if len(results) != len(part):
        raise RuntimeError(f"{len(results)} results for {len(part)} pairs")
    return results
