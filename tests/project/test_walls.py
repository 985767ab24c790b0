"""Import contracts between and inside the packages: import-linter reports a forbidden import."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN = [
    (
        "reward_service/engine/engine.py",
        "import trainer.config",
        "The reward service never imports the trainer",
    ),
    ("trainer/rl/karlo.py", "import reward_service.images", "The trainer imports only client"),
    ("reward_service/images.py", "import torch", "Client, adapters, wire types and settings"),
    (
        "reward_service/scheduler/scheduler.py",
        "import fastapi",
        "The scheduler imports neither torch",
    ),
    ("trainer/rl/objective.py", "import diffusers", "The trainer's mathematics"),
    ("trainer/config.py", "import trainer.rl.karlo", "Inside the trainer, imports point downwards"),
]


def broken_contracts(folder: Path) -> list[str]:
    """Return the contracts that import-linter reports as broken."""
    lint = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache"],
        cwd=folder, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(folder)},
    )  # fmt: skip
    assert "Contracts:" in lint.stdout, lint.stdout + lint.stderr
    return [line for line in lint.stdout.splitlines() if " BROKEN" in line]


@pytest.mark.parametrize(("file", "line", "contract"), FORBIDDEN)
def test_forbidden_import_is_reported(tmp_path, file, line, contract):
    """Each contract is broken on purpose once, and import-linter names it."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in ("reward_service", "trainer", "miniature"):
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("models", "__pycache__")
        )
    with (tmp_path / file).open("a") as module:
        module.write(f"\n{line}\n")
    assert any(name.startswith(contract) for name in broken_contracts(tmp_path))
