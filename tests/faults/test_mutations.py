"""A few thousand damaged requests; `python -m tests.support.faults.mutations` sends 200,000."""

from __future__ import annotations

from tests.support.faults import mutations
from tests.support.faults.mutants import mutants


def test_damaged_requests_are_refused_or_scored() -> None:
    """Never a crash or a fault of ours, in little memory; and the damage reaches images and bodies."""
    found = mutations.run(4000, seed=1)
    assert found.failures == []
    assert found.in_order, (found.warm_mb, found.end_mb)
    told = {status for _, status in found.answers}
    assert {"200", "400 malformed_body", "422 not_an_image", "422 invalid_request"} <= told
    assert found.answers["socket", "200"] >= 1


def test_mutants_are_the_same_for_a_seed() -> None:
    """So that a failure can be looked at again."""
    first, again, other = mutants(3), mutants(3), mutants(4)
    made = [first() for _ in range(50)]
    assert made == [again() for _ in range(50)]
    assert made != [other() for _ in range(50)]


def test_a_failure_is_told() -> None:
    """A 5xx, an exception and a code that is not documented each spoil the verdict."""
    for status, code in ((500, "scoring_failed"), (599, "ValueError()"), (418, "teapot")):
        found = mutations.Findings()
        found.note("intake", status, code, ("application/json", b"{}"))
        assert not found.in_order
        assert "NOT in order" in mutations.report(found, 1, 0)
    assert mutations.Findings(end_mb=mutations.LEVEL_MB + 1).in_order is False
