"""Who scored: the identity of a service's evaluators, remembered so that a change cannot pass unnoticed."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import msgspec

from reward_service.failures import IdentityChangedError, InputError
from reward_service.protocol import EvaluatorIdentity, EvaluatorList

#: Evaluator → what produces its numbers. As JSON: {name: {"fingerprint": …, "calibration": …}}.
Identity: TypeAlias = Mapping[str, EvaluatorIdentity]
#: What may be insisted on: an identity, also as read from JSON; that of the first answer; or none.
Pinned: TypeAlias = Identity | Mapping[str, Any] | Literal["first"] | None


def identity(described: EvaluatorList) -> dict[str, EvaluatorIdentity]:
    """Who scores, by what the service says of itself."""
    return {
        name: EvaluatorIdentity(it.fingerprint, it.calibration) for name, it in described.evaluators.items()
    }


class Pin:
    """The identity that answers are held against; may be shared by threads.

    :param given: the identity to insist on, or ``first`` for that of the first answer
    :raises InputError: it is neither
    """

    def __init__(self, given: Identity | Mapping[str, Any] | Literal["first"]) -> None:
        self._lock = threading.Lock()
        self._open = given == "first"
        self._known: dict[str, EvaluatorIdentity] = {} if self._open else _read(given)
        self._all = None if self._open else frozenset(self._known)

    def check(self, answered: Identity, *, everyone: bool) -> None:
        """Nothing if the answer is the pinned scorer's.

        :param everyone: whether all of the service's evaluators were asked, so that none may join or leave
        :raises IdentityChangedError: it is another's
        """
        with self._lock:
            changes = [change for name, it in answered.items() if (change := self._change(name, it))]
            if everyone and self._all not in (None, frozenset(answered)):
                changes.append(f"the evaluators are {_list(answered)}, no longer {_list(self._all or ())}")
            if changes:
                raise IdentityChangedError(
                    f"the scorer has changed: {'; '.join(changes)}. Scores before and after must not be "
                    "compared; go back to the first scorer, or score everything again"
                )
            if self._open:
                self._known.update(answered)
                self._all = frozenset(answered) if everyone else self._all

    def _change(self, name: str, found: EvaluatorIdentity) -> str | None:
        pinned = self._known.get(name)
        if pinned is None:
            return None if self._open else f"{name} was not pinned"
        parts = [part for part in found.__struct_fields__ if getattr(found, part) != getattr(pinned, part)]
        return f"{name} has another {' and '.join(parts)}" if parts else None


def _read(given: Any) -> dict[str, EvaluatorIdentity]:
    try:
        known = msgspec.convert(dict(given), dict[str, EvaluatorIdentity])
    except (TypeError, ValueError, msgspec.ValidationError):
        raise InputError("pin must be 'first', or what client.identity() gave, also read from JSON") from None
    if not known:
        raise InputError("pin names no evaluator; take it from client.identity(), or use 'first'")
    return known


def _list(names: Any) -> str:
    return ", ".join(sorted(names))
