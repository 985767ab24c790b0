"""Identity of the evaluators, and its comparison between responses. No torch."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias

import msgspec

from reward_service.client.connections import PerProcess
from reward_service.client.errors import IdentityChangedError, InputError
from reward_service.protocol import EvaluatorIdentity, EvaluatorList

#: Evaluator → what produces its numbers. As JSON: {name: {"fingerprint": …, "calibration": …}}.
Identity: TypeAlias = Mapping[str, EvaluatorIdentity]
#: Argument `pin`: an identity, also as read from JSON; `first` for that of the first response; or None.
PinOption: TypeAlias = Identity | Mapping[str, Any] | Literal["first"] | None


def identity_of(evaluators: EvaluatorList) -> dict[str, EvaluatorIdentity]:
    """Return the identity of the evaluators that the service lists."""
    return {
        name: EvaluatorIdentity(it.fingerprint, it.calibration) for name, it in evaluators.evaluators.items()
    }


class IdentityPin:
    """The identity that every response is compared with. Thread-safe.

    Args:
        pin: the expected identity, or `first` to adopt that of the first response

    Raises:
        InputError: `pin` is neither
    """

    def __init__(self, pin: Identity | Mapping[str, Any] | Literal["first"]) -> None:
        self._locks = PerProcess(threading.Lock)
        self._adopting = pin == "first"
        self._pinned: dict[str, EvaluatorIdentity] = {} if self._adopting else _parse_pin(pin)
        self._all_names = None if self._adopting else frozenset(self._pinned)

    def check(self, found: Identity, *, complete: bool) -> None:
        """Raise an error if a response has another identity than the pinned one.

        Args:
            found: identity of the evaluators in the response
            complete: all evaluators of the service were requested, so that none may be added or missing

        Raises:
            IdentityChangedError: another fingerprint, calibration or set of evaluators
        """
        with self._locks.get():
            changes = [change for name, it in found.items() if (change := self._change(name, it))]
            if complete and self._all_names not in (None, frozenset(found)):
                changes.append(f"the evaluators are {_join(found)}, no longer {_join(self._all_names or ())}")
            if changes:
                raise IdentityChangedError(
                    f"the service's evaluators have changed: {'; '.join(changes)}. Scores from before and "
                    "after must not be compared; restore the first evaluators, or score everything again"
                )
            if self._adopting:
                self._pinned.update(found)
                self._all_names = frozenset(found) if complete else self._all_names

    def _change(self, name: str, found: EvaluatorIdentity) -> str | None:
        pinned = self._pinned.get(name)
        if pinned is None:
            return None if self._adopting else f"{name} was not pinned"
        parts = [part for part in found.__struct_fields__ if getattr(found, part) != getattr(pinned, part)]
        return f"{name} has another {' and '.join(parts)}" if parts else None


def _parse_pin(pin: Any) -> dict[str, EvaluatorIdentity]:
    try:
        pinned = msgspec.convert(dict(pin), dict[str, EvaluatorIdentity])
    except (TypeError, ValueError, msgspec.ValidationError):
        raise InputError(
            "pin must be 'first', or a result of client.identity(), which may be read from JSON"
        ) from None
    if not pinned:
        raise InputError("pin names no evaluator; use the result of client.identity(), or 'first'")
    return pinned


def _join(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
