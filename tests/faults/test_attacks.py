"""Attacks by one client: refused, and without a fault of the service or of another client's requests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.attacks.catalog import attacks
from tests.support.attacks.measuring import observed
from tests.support.attacks.program import Program, running
from tests.support.attacks.sending import Target

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
# By their number, not by their time, so that a slow machine sends the same: the first leaves after a second.
_TURNS, _LONGEST_S = 3, 600.0
_REFUSED = (
    "jpeg-6000-scans", "jpeg-empty-app2", "png-empty-chunks", "webp-empty-chunks",
    "form-weights-lists", "form-evaluators-commas", "form-parts", "json-items", "msgpack-items-nil",
    "chunks-of-one-byte", "chunks-of-a-form", "headers-10000", "trailers-without-end",
)  # fmt: skip
_ANSWERED = (
    "jpeg-fill-bytes", "webp-13-flat", "png-texts", "accept-60-kb", "entity-of-4301-digits", "random-letters",
    "emoji-words", "combining-marks",
)  # fmt: skip


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    """The miniature's service, as a program of its own."""
    with running(warm=False) as started:
        yield started


@pytest.mark.parametrize("name", _REFUSED)
def test_attack_is_refused(program: Program, name: str) -> None:
    """Every answer is a problem of the client's, and other clients get their scores."""
    answers = _attack(program, name)
    assert all(status.startswith("4") for status in answers), answers


@pytest.mark.parametrize("name", _ANSWERED)
def test_attack_is_answered(program: Program, name: str) -> None:
    """It may be scored or refused, and other clients get their scores."""
    answers = _attack(program, name)
    assert all(status == "200" or status.startswith("4") for status in answers), answers


def _attack(program: Program, name: str) -> set[str]:
    """Send an attack a few times beside a client that scores and a probe; return its own answers."""
    play = attacks()[name].prepare()
    target = Target(program.url, _LONGEST_S)
    with observed(program.url) as observers:
        for _ in range(_TURNS):
            play(target, 0)
        waits = [each.stop() for each in observers]
    assert [each.failed for each in waits] == [0, 0], waits
    assert program.ready
    answers = set(target.answers) - {"left"}
    assert answers, "every request was abandoned"
    return answers
