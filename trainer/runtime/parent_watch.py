"""Run a module in a process that ends with its parent.

`python -m trainer.runtime.parent_watch MODULE ARGUMENT...` is `python -m MODULE ARGUMENT...`.

The parent gives it a pipe for standard input and never writes: when that ends, the parent is gone, however it
went. Nothing of the project is imported before the module is.
"""

import os
import runpy
import signal
import sys
import threading


def end_with_parent() -> None:
    """Have this process told to stop (SIGTERM) when its standard input ends."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    end_with_parent()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
