"""Install without extras: a working client, and programs that name the extra they need."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HIDDEN = (
    "torch",
    "torchvision",
    "uvicorn",
    "fastapi",
    "open_clip",
    "diffusers",
    "peft",
    "transformers",
    "ftfy",
    "scipy",
    "sklearn",
    "optuna",
)


def run_without_extras(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process in which the extras' packages cannot be imported."""
    hide = f"import sys\nfor name in {HIDDEN}: sys.modules[name] = None\n"
    return subprocess.run(
        [sys.executable, "-c", hide + code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )


def test_client_works_without_extras():
    """A program that only requests scores needs no extra."""
    done = run_without_extras(
        "from reward_service.client import RewardClient; RewardClient('http://x').close()"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("code", "extra"),
    [
        ("from reward_service.cli import main; main(['serve', '--port', '0'])", "service"),
        ("sys.argv = ['t', 'generate', '--prompt', 'x']; from trainer.cli import main; main()", "trainer"),
    ],
)
def test_program_without_its_extra_names_the_extra(code, extra):
    """One line names the missing package and the extra, in place of a traceback."""
    done = run_without_extras(code)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"karlo-reward-lab[{extra}]" in done.stderr
