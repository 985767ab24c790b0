"""`reward-service` on a device whose faults are selected by the prompt.

Run it as `python -m tests.support.faults.program serve …`.
"""

from __future__ import annotations

import sys

from reward_service import cli
from reward_service.scoring import service as service
from tests.support.faults.device import faulty_engine

if __name__ == "__main__":
    service.build_default_engine = faulty_engine
    cli.main(sys.argv[1:])
