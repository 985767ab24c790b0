"""Client of the reward service: `RewardClient`, and `AsyncRewardClient` for asyncio. No torch.

The exceptions:

```text
RewardClientError
├── InputError            the arguments, a prompt or an image cannot be sent; nothing was sent
├── ServiceError          the service responded with a problem: .status, .problem
│   ├── RejectedError         a retry would not help (4xx, or a pair that cannot be scored)
│   └── OverloadedError       busy or not ready until the retry budget was spent
├── UnreachableError      no response until the retry budget was spent
├── DeadlineError         the scores did not arrive within deadline_s
├── NotReadyError         wait_until_ready ran out of time
├── IdentityChangedError  other evaluators scored than the pinned ones, or than earlier in the call
├── ClientClosedError     the client was used after close()
└── ProtocolError         a response outside this protocol, or a score that is not a number
```

A failed score is always an exception, never a number.
"""

from reward_service.client.client import AsyncRewardClient, RewardClient
from reward_service.client.encoding import ImageLike
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
from reward_service.client.proxies import describe_failure

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
    "describe_failure",
]
