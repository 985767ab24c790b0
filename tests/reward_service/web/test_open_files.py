"""Limit of open files: connections that it allows, and the warning at the start."""

from __future__ import annotations

import resource

import pytest

from reward_service.web.open_files import allowed_connections, file_limit_warning

INFINITE = resource.RLIM_INFINITY


@pytest.fixture(params=[(64, 64), (256, 1024), (1024, INFINITE), (INFINITE, INFINITE), (9000, 9000)])
def limits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Soft and hard limit of the process, as if."""
    found = [request.param]
    monkeypatch.setattr(resource, "getrlimit", lambda _: found[0])
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: found.__setitem__(0, pair))
    given: tuple[int, int] = request.param
    return given


def test_low_limit_leaves_room_for_connections(limits: tuple[int, int]) -> None:
    """Half of a low limit, and always all that is wanted where the limit can be raised."""
    low = {(64, 64): 32, (256, 1024): 896}
    assert allowed_connections(4096) == low.get(limits, 4096)


def test_warning_names_limit_and_remedy(limits: tuple[int, int]) -> None:
    """Only if not all connections are possible."""
    warning = file_limit_warning(4096)
    if limits[1] in (64, 1024):
        assert warning is not None
        assert f"{limits[1]} files" in warning
        assert "ulimit -n" in warning
    else:
        assert warning is None
