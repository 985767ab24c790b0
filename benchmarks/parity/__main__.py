"""`make parity`: compare our scores with the references' scores on random weights.

Exits with 0 if every difference is within its tolerance and every known mistake would be noticed, else 1.
"""

import os
import sys


def main() -> int:
    """Set the environment that the imports need, and run the program."""
    # hpsv2 uses any visible GPU, in half precision; and nothing may be downloaded.
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
        sys.exit(f"parity: {error.name} is not installed; run `make parity`, which creates the environment")
