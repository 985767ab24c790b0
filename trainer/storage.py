"""What a run leaves behind: a folder of plain files, each written whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from trainer.config import LORA_FILE, ConfigError, TrainerConfig


class RunFolder:
    """One run's folder: config.yaml, run.json, metrics.jsonl, lora/, pictures and evaluation.json."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, config: TrainerConfig, path: Path | None = None) -> "RunFolder":
        """An empty folder: `path`, which must hold nothing yet, or the next free `<runs_dir>/<name>[-n]`."""
        run = cls(path or _next_free(config.runs_dir / config.name))
        resolved = {"trainer": config.model_dump(mode="json")}
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            if any(run.path.iterdir()):
                raise ConfigError(f"{run.path}: this folder is not empty; name another with --run")
            run.write_text("config.yaml", yaml.safe_dump(resolved, sort_keys=False))
        except OSError as error:
            reason = f"cannot be made or written to: {error.strerror}"
            raise ConfigError(f"{run.path}: the run folder {reason}; name another with --run") from error
        return run

    @property
    def lora(self) -> Path:
        """Folder of the adapter."""
        return self.path / "lora"

    def write_text(self, name: str, text: str) -> None:
        """Write a text file atomically."""
        write_atomically(self.path / name, lambda target: _write_synced(target, text.encode()))

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file atomically. A number that is not finite is an error."""
        self.write_text(name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        line = json.dumps(record, allow_nan=False)
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def save_picture(self, name: str, picture: Image.Image) -> Path:
        """Write a PNG atomically and say where."""
        path = self.path / name
        write_atomically(path, lambda target: picture.save(target, format="PNG"))
        return path

    def save_lora(self, save: Callable[[Path], object], card: str) -> None:
        """Write lora/: what `save` puts there and a README.md; an older one is replaced as a whole."""
        staging = Path(tempfile.mkdtemp(prefix=".lora-", dir=self.path))
        save(staging)
        (staging / "README.md").write_text(card, encoding="utf-8")
        for file in staging.iterdir():
            file.chmod(0o644)
        staging.chmod(0o755)
        if self.lora.exists():
            shutil.rmtree(self.lora)
        staging.rename(self.lora)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file beside `path`, then put it in place in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _next_free(path: Path) -> Path:
    candidates = (path if n == 1 else path.with_name(f"{path.name}-{n}") for n in range(1, 10_000))
    return next(candidate for candidate in candidates if not candidate.exists())


def model_card(config: TrainerConfig, identity: Mapping[str, str], summary: Sequence[str]) -> str:
    """README.md of a LoRA: what it is for, how it was made, what it gained, how to load it."""
    source = config.karlo.repo or (config.karlo.path.name if config.karlo.path else "")
    judges = "\n".join(f"- {name}: `{fingerprint}`" for name, fingerprint in sorted(identity.items()))
    return f"""---
library_name: peft
tags: [lora, unclip, reinforcement-learning]
---
# {config.name}

A LoRA for the decoder of {source}, rank {config.lora.rank}, trained for {config.iterations} iterations by
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
