"""What a run leaves behind: a folder of plain files, each written whole or not at all."""

import fcntl
import json
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from safetensors import SafetensorError

from trainer.config import LORA_FILE, ConfigError, TrainerConfig
from trainer.errors import StorageError, reason

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
LOCK_FILE = ".lock"
STAGING, REMOVING, PARTIAL = (
    ".writing-",
    ".removing-",
    ".partial",
)  # names of what is not, or no longer, whole


class RunFolder:
    """One run's folder: config.yaml, metrics.jsonl, checkpoints/, lora/, pictures and evaluation.json.

    `create` and `resume` lock it until it is closed, or the process ends.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unlock: Callable[[], object] = tuple

    def close(self) -> None:
        """Let others write here."""
        self._unlock()

    @classmethod
    def create(cls, config: TrainerConfig, path: Path | None = None) -> "RunFolder":
        """An empty folder: `path`, which must hold nothing yet, or the next free `<runs_dir>/<name>[-n]`."""
        wanted = path or config.runs_dir / config.name
        try:
            run = cls(_make_empty(path) if path else _make_next_free(wanted))
            run._lock()
            clear_stale(run.path)
            run.write_config(config)
        except OSError as error:
            cause = f"cannot be made or written to: {error.strerror}"
            raise ConfigError(f"{wanted}: the run folder {cause}; name another with --run") from error
        return run

    @classmethod
    def resume(cls, path: Path) -> "RunFolder":
        """The folder of a run that began before, without what was being written when it ended.

        Raises StorageError where another trainer is writing it.
        """
        run = cls(path)
        run._lock()
        clear_stale(path)
        return run

    def _lock(self) -> None:
        descriptor = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        self._unlock = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            writer = os.read(descriptor, 20).decode(errors="replace") or "unknown"
            raise StorageError(
                f"{self.path}: another trainer (process {writer}) is writing this run; "
                "wait until it ends, or stop it"
            ) from error
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())

    @property
    def lora(self) -> Path:
        """Folder of the adapter."""
        return self.path / "lora"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def write_config(self, config: TrainerConfig, name: str = CONFIG_FILE) -> None:
        """Write what was resolved; a run is one from here on."""
        resolved = {"trainer": config.model_dump(mode="json")}
        self.write_text(name, yaml.safe_dump(resolved, sort_keys=False))

    def write_text(self, name: str, text: str) -> None:
        """Write a text file atomically."""
        write_atomically(self.path / name, lambda target: write_synced(target, text.encode()))

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file atomically. A number that is not finite is an error."""
        self.write_text(name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    def read_json(self, name: str) -> Any:
        """What `write_json` wrote; None where it did not. Raises StorageError where it is no JSON."""
        try:
            return json.loads((self.path / name).read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise StorageError(
                f"{self.path / name}: not what was written there ({error}); delete it and run the same "
                "command again"
            ) from error

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl, on the disk before a checkpoint that counts on it."""
        line = json.dumps(record, allow_nan=False)
        path = self.path / METRICS_FILE
        with naming(path), path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def metrics_bytes(self) -> int:
        """Size of metrics.jsonl."""
        path = self.path / METRICS_FILE
        return path.stat().st_size if path.exists() else 0

    def cut_metrics(self, size: int) -> None:
        """Take away what was logged after metrics.jsonl had this size: it is going to be logged again.

        Where it has been cut shorter since, half a line at its end goes: the next would be joined to it.
        """
        path, found = self.path / METRICS_FILE, self.metrics_bytes()
        if 0 < found < size:
            size = path.read_bytes().rfind(b"\n") + 1
        if found > size:
            os.truncate(path, size)

    def save_picture(self, name: str, picture: Image.Image) -> Path:
        """Write a PNG atomically and say where."""
        path = self.path / name
        write_atomically(path, lambda target: picture.save(target, format="PNG"))
        return path

    def save_lora(self, save: Callable[[Path], object], card: str) -> None:
        """Write lora/: what `save` puts there and a README.md; an older one is replaced as a whole."""
        with naming(self.lora), staging(self.path, "lora-") as folder:
            try:
                save(folder)
            except SafetensorError as error:  # what safetensors makes of an error in writing
                raise StorageError(f"{self.lora}: cannot be written ({reason(error)})") from error
            (folder / "README.md").write_text(card, encoding="utf-8")
            replace_folder(folder, self.lora)


# ------------------------------------------------------------------------------------------- writing


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file beside `path`, then put it in place in one step.

    Several processes may write the same file: one after the other.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}{PARTIAL}")
    with _one_writer(path.parent):
        try:
            with naming(path):
                write(partial)
                partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def _one_writer(folder: Path) -> Iterator[None]:
    """One process at a time, where the file system can lock a folder: a lock that leaves no file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def staging(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `parent` to be filled and put in place; whatever goes wrong, it does not stay."""
    folder = Path(tempfile.mkdtemp(prefix=f"{STAGING}{prefix}", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def clear_stale(folder: Path) -> None:
    """Remove what was being written or removed in `folder` when the process that did so was killed."""
    for prefix in (STAGING, REMOVING):
        for stale in folder.glob(f"{prefix}*"):
            shutil.rmtree(stale)
    for partial in folder.glob(f".*{PARTIAL}"):
        partial.unlink()


def replace_folder(folder: Path, target: Path) -> None:
    """Put a filled folder in the place of `target`, its files on the disk first; others may read it."""
    for file in folder.iterdir():
        file.chmod(0o644)
        _sync(file)
    folder.chmod(0o755)
    _sync(folder)
    if target.exists():
        remove_folder(target)
    folder.rename(target)
    _sync(target.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder; it leaves its name at once, however long the rest takes."""
    doomed = path.with_name(f"{REMOVING}{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an OSError that names no file name this one: a full disk does not say which write it refused."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


# ------------------------------------------------------------------------------------------- folders


def _make_empty(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    # A lock and what is not whole: a run that was killed before it began.
    if any(not file.name.startswith(".") for file in path.iterdir()):
        raise ConfigError(f"{path}: this folder is not empty; name another with --run, or add --resume")
    return path


def _make_next_free(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    for n in range(1, 10_000):
        candidate = path if n == 1 else path.with_name(f"{path.name}-{n}")
        try:
            candidate.mkdir()
        except FileExistsError:
            continue
        return candidate
    raise ConfigError(f"{path}: ten thousand runs have this name; choose another (trainer.name)")


def newest_run(config: TrainerConfig) -> Path:
    """The folder of the run of this name that was last begun. Raises ConfigError where there is none."""
    name = re.compile(rf"{re.escape(config.name)}(-\d+)?")
    runs = [
        path.parent for path in config.runs_dir.glob(f"*/{CONFIG_FILE}") if name.fullmatch(path.parent.name)
    ]
    if not runs:
        raise ConfigError(
            f"{config.runs_dir}: no run named {config.name} to go on with; name its folder with --run"
        )
    return max(runs, key=lambda path: (path / CONFIG_FILE).stat().st_mtime_ns)


def model_card(config: TrainerConfig, done: int, identity: Mapping[str, str], summary: Sequence[str]) -> str:
    """README.md of a LoRA after `done` iterations: what for, how made, what gained, how to load."""
    source = config.karlo.repo or (config.karlo.path.name if config.karlo.path else "")
    judges = "\n".join(f"- {name}: `{fingerprint}`" for name, fingerprint in sorted(identity.items()))
    return f"""---
library_name: peft
tags: [lora, unclip, reinforcement-learning]
---
# {config.name}

A LoRA for the decoder of {source}, rank {config.lora.rank}, trained for {done} iterations by
policy gradient on the rewards of these evaluators (fingerprint/calibration):

{judges}

On held-out prompts, against the same decoder without it:

{chr(10).join(f"- {line}" for line in summary)}

## Load

`decoder` is Karlo's decoder, a diffusers `UNet2DConditionModel`:

```python
decoder.load_lora_adapter("lora", prefix=None, weight_name="{LORA_FILE}")
pipeline = UnCLIPPipeline(decoder=decoder, **other_parts)
```

It inherits the licence of the model it was trained on.
"""
