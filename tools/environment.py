"""Write environment.yml from requirements.lock, so that the conda environment cannot drift from the lock.

`python tools/environment.py` prints the file, `--write` writes it.
"""

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
ENVIRONMENT = ROOT / "environment.yml"

HEADER = """\
# The conda environment with everything: service, trainer, tests and Jupyter.
#
#   conda env create -f environment.yml && conda activate rl-unclip-env
#
# Made by `make lock` from requirements.lock; do not edit by hand.
# hpsv2 is absent on purpose: it pins pytest==7.2.0 and protobuf<4 and cannot share an environment with
# the packages below. The reward service does not need it; it is only an oracle for the parity tests, in an
# environment of its own.
name: rl-unclip-env
channels:
  - conda-forge
  - nodefaults
dependencies:
  - python=3.11
  - pip
  - pip:
"""


def locked_requirements(lock: str) -> list[str]:
    """Return each `name==version[ ; marker]` of a lock's text, in its order, without the hashes."""
    return [line.removesuffix("\\").strip() for line in lock.splitlines() if re.match(r"[\w.-]+==", line)]


def render(lock: str) -> str:
    """Return the text of environment.yml for the text of a lock."""
    lines = [f'      - "{requirement}"' for requirement in locked_requirements(lock)]
    return HEADER + "\n".join([*lines, "      - -e ."]) + "\n"


def main() -> None:
    """Print environment.yml or write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {ENVIRONMENT.name}")
    text = render(LOCK.read_text())
    if parser.parse_args().write:
        ENVIRONMENT.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
