"""Run a module in a process that ends with its parent process.

`python -m trainer.runtime.parent_watch MODULE ARGUMENT...` does the same as `python -m MODULE ARGUMENT...`.

The parent connects a pipe to the child's standard input and never writes to it: end of file means that the
parent is gone, even if it was killed. Nothing of the project is imported before MODULE is.
"""

import os
import runpy
import signal
import sys
import threading


def end_with_parent() -> None:
    """Send SIGTERM to this process when its standard input reaches end of file."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    end_with_parent()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
