"""Pictures and their scores as arrays, and as a file: what one policy does with a set of prompts."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self
from zipfile import BadZipFile

import numpy as np

from trainer.errors import StorageError
from trainer.scoring import Floats, Pictures
from trainer.storage import write_atomically, write_synced


class Measurement(NamedTuple):
    """Pictures of P prompts, G each, and their scores by K evaluators."""

    prompts: tuple[str, ...]
    pictures: Pictures  # (P, G, H, W, 3)
    raw: Floats  # (P, G, K)
    z: Floats  # (P, G, K)

    def first(self, prompts: int | None) -> Self:
        """That of the first so many prompts; None: of all."""
        cut = slice(prompts)
        return type(self)(self.prompts[cut], self.pictures[cut], self.raw[cut], self.z[cut])

    def encode(self) -> bytes:
        """All but the prompts, as the content of a .npz file."""
        buffer = io.BytesIO()
        np.savez(buffer, pictures=self.pictures, raw=self.raw, z=self.z)
        return buffer.getvalue()

    @classmethod
    def decode(cls, content: bytes, prompts: Sequence[str]) -> Self:
        """What `encode` returned, of these prompts. Raises ValueError where it is damaged or of others."""
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                pictures, raw, z = (arrays[name] for name in ("pictures", "raw", "z"))
        except (LookupError, TypeError, EOFError, BadZipFile) as error:
            raise ValueError(f"is no measurement, or damaged ({error})") from error
        groups = (len(prompts), *pictures.shape[1:2])
        whole = pictures.ndim == 5 and pictures.shape[4] == 3 and pictures.dtype == np.uint8
        if not whole or raw.ndim != 3 or raw.shape != z.shape:
            raise ValueError("is no measurement: its arrays are not pictures with their scores")
        if pictures.shape[:2] != groups or raw.shape[:2] != groups:
            raise ValueError(f"measures {len(pictures)} prompts, not these {len(prompts)}")
        return cls(tuple(prompts), pictures, raw.astype(np.float64), z.astype(np.float64))

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all. The prompts are kept elsewhere, in prompts.json."""
        content = self.encode()
        write_atomically(path, lambda target: write_synced(target, content))

    @classmethod
    def load(cls, path: Path, prompts: Sequence[str]) -> Self:
        """The measurement of these prompts that was saved. Raises StorageError."""
        try:
            return cls.decode(path.read_bytes(), prompts)
        except FileNotFoundError as error:
            raise StorageError(f"{path}: no such file; has this run ended?") from error
        except ValueError as error:
            raise StorageError(f"{path}: {error}; delete it and run the same command again") from error
