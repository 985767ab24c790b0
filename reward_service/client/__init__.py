"""Client of the reward service: `RewardClient`, and `AsyncRewardClient` for asyncio. No torch.

Exceptions::

    RewardClientError
    ├── InputError            the arguments, a prompt or an image cannot be sent; they were not
    ├── ServiceError          the service answered with a problem: .status, .problem
    │   ├── RejectedError         it will answer so again (4xx, or a pair that cannot be scored)
    │   └── OverloadedError       busy or not ready until the retry budget was spent
    ├── UnreachableError      no answer until the retry budget was spent
    ├── DeadlineError         the scores were not there within deadline_s
    ├── NotReadyError         wait_until_ready ran out of time
    ├── IdentityChangedError  another scorer answered than the pinned one, or than a moment ago
    ├── ClientClosedError     the client was used after close()
    └── ProtocolError         an answer that is not this protocol's, or a score that is not a number

A failed score is always an exception, never a number.
"""

from reward_service.client.client import AsyncRewardClient, RewardClient
from reward_service.client.errors import (
    ClientClosedError,
    DeadlineError,
    IdentityChangedError,
    InputError,
    NotReadyError,
    OverloadedError,
    ProtocolError,
    RejectedError,
    RewardClientError,
    ServiceError,
    UnreachableError,
)
from reward_service.client.payload import ImageLike

__all__ = [
    "AsyncRewardClient",
    "ClientClosedError",
    "DeadlineError",
    "IdentityChangedError",
    "ImageLike",
    "InputError",
    "NotReadyError",
    "OverloadedError",
    "ProtocolError",
    "RejectedError",
    "RewardClient",
    "RewardClientError",
    "ServiceError",
    "UnreachableError",
]
