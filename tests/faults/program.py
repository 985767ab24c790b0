"""``reward-service`` on a device that breaks by the prompt: ``python -m tests.faults.program serve …``."""

from __future__ import annotations

import sys

from reward_service import cli, judge
from tests.faults.device import faulty_engine

if __name__ == "__main__":
    judge._build_engine = faulty_engine
    cli.main(sys.argv[1:])
