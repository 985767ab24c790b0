"""Virtual environment of the references: the project's packages, plus hpsv2 and OpenAI's clip.

A .pth file makes the project's packages visible in it. Only the references are installed, pinned by hash, so
that they cannot change the project's own environment.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("requirements.txt")


def make(folder: Path) -> None:
    """Create the environment; an existing one is replaced.

    Raises:
        SystemExit: the references cannot be installed
    """
    venv.EnvBuilder(clear=True, symlinks=True, with_pip=False).create(folder)
    python = folder / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / version / "site-packages"
    (packages / "project.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = [
        "--disable-pip-version-check",
        "--quiet",
        "--no-deps",
        "--require-hashes",
        "--only-binary=:all:",
    ]
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", *options, "-r"]
    found = subprocess.run([*command, str(REQUIREMENTS)], capture_output=True, text=True, check=False)
    if found.returncode != 0:
        shutil.rmtree(folder, ignore_errors=True)
        lines = [line for line in found.stderr.splitlines() if "ERROR" in line] or [found.stderr.strip()]
        cause = lines[-1].removeprefix("ERROR: ")[:200]
        raise SystemExit(
            f"parity: cannot install hpsv2 and clip-anytorch ({cause}); check that PyPI is reachable"
        )
    _copy_vocabulary(packages)


def _copy_vocabulary(packages: Path) -> None:
    """Copy the BPE file that hpsv2's wheel lacks; open_clip's is the same file."""
    from open_clip.tokenizer import default_bpe

    source = Path(default_bpe())
    shutil.copy(source, packages / "hpsv2" / "src" / "open_clip" / source.name)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
