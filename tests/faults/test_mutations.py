"""A few thousand corrupted requests; `python -m tests.support.faults.mutations` sends 200,000."""

from __future__ import annotations

import pytest

from tests.support.faults import mutations
from tests.support.faults.mutants import mutants


@pytest.mark.slow
def test_corrupted_requests_are_rejected_or_scored() -> None:
    """Never a crash or a server error, in little memory; the corruption reaches images and bodies."""
    found = mutations.run(4000, seed=1)
    assert found.failures == []
    assert found.passed, (found.warm_mb, found.end_mb)
    outcomes = {status for _, status in found.outcomes}
    assert {"200", "400 malformed_body", "422 not_an_image", "422 invalid_request"} <= outcomes
    assert found.outcomes["socket", "200"] >= 1


def test_mutants_are_reproducible() -> None:
    """A seed gives the same mutants, so that a failure can be reproduced."""
    first, again, other = mutants(3), mutants(3), mutants(4)
    made = [first() for _ in range(50)]
    assert made == [again() for _ in range(50)]
    assert made != [other() for _ in range(50)]


def test_failure_is_reported() -> None:
    """A 5xx, an exception and an undocumented code each make the run fail."""
    for status, code in ((500, "scoring_failed"), (599, "ValueError()"), (418, "teapot")):
        found = mutations.Findings()
        found.record("parser", status, code, ("application/json", b"{}"))
        assert not found.passed
        assert "FAILED" in mutations.report(found, 1, 0)
    assert mutations.Findings(end_mb=mutations.LEVEL_MB + 1).passed is False
