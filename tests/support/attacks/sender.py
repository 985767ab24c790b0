"""Sender of one attack, in a process of its own: `python -m tests.support.attacks.sender URL NAME SECONDS`.

It prints `ready` when its files are built, begins at a line on stdin, and prints a line of JSON at the end:
the answers by status and the seconds of its CPU time. Open requests are left as they are.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time

from tests.support.attacks.catalog import attacks
from tests.support.attacks.sending import Target


def main(url: str, name: str, seconds: float) -> None:
    """Run the attack."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    attack = attacks()[name]
    play = attack.prepare()
    print("ready", flush=True)
    sys.stdin.readline()
    target, cpu_s = Target(url, seconds), time.process_time()
    attack.run(target, play)
    used_s = time.process_time() - cpu_s
    print(json.dumps({"answers": dict(target.answers), "cpu_s": used_s}), flush=True)
    # Threads still wait for answers: the client leaves.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
