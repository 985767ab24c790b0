"""Checkpoints: complete or absent, and never mistaken for another one."""

import errno
import json
import resource
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from trainer.config import CheckpointsConfig
from trainer.rl.train import TrainingState
from trainer.runs.checkpoints import Checkpoints, Snapshot, decode

REPOSITORY = Path(__file__).parents[3]


def snapshot(done: int, composite: float | None = None) -> Snapshot:
    return Snapshot(
        done, {"lora/a": torch.full((100,), float(done))}, {"updates": done}, {"bad": 1}, composite
    )


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", CheckpointsConfig(keep=2), {"config": {"seed": 7}})


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_checkpoint_is_read_as_it_was_written(checkpoints: Checkpoints) -> None:
    """Tensors to the bit, the other state, and its provenance."""
    checkpoints.save(snapshot(3, composite=0.5))
    stored = checkpoints.latest()
    assert stored is not None
    read, origin = decode(stored)
    assert torch.equal(read.tensors["lora/a"], torch.full((100,), 3.0))
    assert (read.done, read.training, read.stopper, read.composite) == (3, {"updates": 3}, {"bad": 1}, 0.5)
    assert origin["config"] == {"seed": 7}
    assert "torch" in origin["versions"]


def test_checkpoints_keep_the_newest_and_the_best(checkpoints: Checkpoints) -> None:
    """However old the best one is."""
    for done, composite in ((1, 0.1), (2, 0.9), (3, None), (4, 0.5), (5, None)):
        checkpoints.save(snapshot(done, composite))
    assert names(checkpoints) == ["best.json", "iteration-000002", "iteration-000004", "iteration-000005"]
    assert checkpoints.best() == (2, 0.9)


@pytest.mark.parametrize("damage", ["manifest.json", "state.json", "tensors.safetensors"])
@pytest.mark.parametrize("how", ["missing", "short", "other"])
def test_latest_skips_and_reports_incomplete_checkpoints(
    damage: str, how: str, checkpoints: Checkpoints
) -> None:
    """Any file missing, truncated or changed: the checkpoint before is read, and the reason reported."""
    checkpoints.save(snapshot(1))
    checkpoints.save(snapshot(2))
    file = checkpoints.folder / "iteration-000002" / damage
    content = file.read_bytes()
    file.unlink()
    if how != "missing":
        file.write_bytes(content[:-1] if how == "short" else b"x" + content[1:])
    reports: list[str] = []
    stored = checkpoints.latest(reports.append)
    assert stored is not None
    assert decode(stored)[0].done == 1
    assert len(reports) == 1
    assert "iteration-000002: not a complete checkpoint" in reports[0]


def test_save_replaces_a_damaged_checkpoint(checkpoints: Checkpoints) -> None:
    """The name of a damaged checkpoint is free for a run that reaches that iteration again."""
    checkpoints.save(snapshot(1))
    (checkpoints.folder / "iteration-000001" / "manifest.json").write_text("{}")
    assert checkpoints.latest() is None
    checkpoints.save(snapshot(1))
    assert checkpoints.latest() is not None


@pytest.mark.parametrize("failing", range(3))
def test_full_disk_leaves_the_previous_checkpoint(
    failing: int, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever file does not fit: the old one is complete, no other file is left, the path is named."""
    checkpoints.save(snapshot(1))
    written = 0
    write_bytes = Path.write_bytes

    def write_to_full_disk(path: Path, content: bytes) -> None:
        nonlocal written
        if written == failing:
            write_bytes(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        written += 1
        write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_to_full_disk)
    with pytest.raises(OSError, match=r"No space left on device: .*iteration-000002"):
        checkpoints.save(snapshot(2))
    assert names(checkpoints) == ["iteration-000001"]
    assert checkpoints.latest() is not None


@pytest.mark.slow
def test_file_size_limit_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    """The same with a limit that the kernel sets: the second, larger checkpoint does not fit."""
    program = f"""if True:
        from pathlib import Path
        import resource, sys, torch
        from trainer.runs.checkpoints import Checkpoints, Snapshot
        from trainer.config import CheckpointsConfig
        checkpoints = Checkpoints(Path({str(tmp_path)!r}), CheckpointsConfig())
        checkpoints.save(Snapshot(1, {{"a": torch.zeros(10)}}, {{}}))
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, {resource.RLIM_INFINITY}))
        try:
            checkpoints.save(Snapshot(2, {{"a": torch.zeros(100_000)}}, {{}}))
        except OSError as error:
            print(error.strerror, error.filename)
    """
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["File", "too", "large", str(tmp_path / "iteration-000002")]
    assert [path.name for path in tmp_path.iterdir()] == ["iteration-000001"]
    manifest = json.loads((tmp_path / "iteration-000001" / "manifest.json").read_text())
    assert set(manifest["files"]) == {"state.json", "tensors.safetensors"}


def test_snapshot_covers_every_field_of_the_training_state() -> None:
    """A new field of TrainingState has to be added to its checkpoints."""
    assert {field.name for field in fields(TrainingState)} - {"policy", "processes"} == {
        "average",
        "optimizer",
        "deviations",
        "drops",
        "done",
    }
