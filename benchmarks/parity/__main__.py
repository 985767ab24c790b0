"""`make parity`: prove that our scores are the references' scores, on random weights, in one command.

Ends with 0 if every difference is allowed and every known mistake would be noticed, with 1 otherwise.
"""

import os
import sys


def main() -> int:
    """Prepare what has to come before the imports, and run the program."""
    # hpsv2 takes any GPU that it sees, and computes in half precision there; and nothing is to be fetched.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from benchmarks.parity.references import stub_unused_imports

    stub_unused_imports()
    from benchmarks.parity.program import run

    return run()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ModuleNotFoundError as error:
        sys.exit(f"parity: {error.name} is not installed here; say make parity, which makes its environment")
