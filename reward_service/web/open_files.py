"""Limit of open files, of which each connection takes one."""

from __future__ import annotations

import resource
from contextlib import suppress

#: Files of the process besides its connections: sockets, pipes, models, images and the log.
_RESERVED_FILES = 128


def allowed_connections(wanted: int) -> int:
    """Raise the process's limit of open files as far as needed and possible.

    Args:
        wanted: connections

    Returns:
        how many connections the limit allows; if it is low, half of it is left to them
    """
    limit = _raised_limit(wanted + _RESERVED_FILES)
    return wanted if limit is None else max(1, min(wanted, limit - min(_RESERVED_FILES, limit // 2)))


def file_limit_warning(wanted: int) -> str | None:
    """Return one line that names limit and remedy if not all connections are possible, else None."""
    allowed = allowed_connections(wanted)
    if allowed >= wanted:
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        f"at most {allowed} connections at a time, not limits.max_connections={wanted}: the process may open "
        f"{limit} files only; allow {wanted + _RESERVED_FILES} with ulimit -n, LimitNOFILE= of systemd or "
        "--ulimit nofile= of docker, or set limits.max_connections lower"
    )


def _raised_limit(needed: int) -> int | None:
    """Return the limit of open files, raised towards `needed`; None if it is not below."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return None
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        soft = allowed
    return None if soft >= needed else soft
