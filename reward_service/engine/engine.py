"""RewardEngine: evaluators over shared towers, prompts and images to scores. No web, no queue.

How long each tower took in a batch, on the device's own clock and without waiting for the device.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from reward_service.engine.clip import TextEmbeddings
from reward_service.engine.evaluators import Evaluator
from reward_service.engine.preprocessing import Preprocessing
from reward_service.engine.types import FatalDeviceError, OutOfMemoryError, Pair, PairScores, ScoringError
from reward_service.images import Pixels
from reward_service.settings import one_line


class Stopwatch:
    """Times stretches of one batch by name; a name's stretches add up."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._stretches: list[tuple[str, float]] = []
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        if not self._cuda:
            started_s = time.perf_counter()
            yield
            self._stretches.append((name, time.perf_counter() - started_s))
            return
        # A GPU is only told what to do here: what it does is between two events in its own queue.
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._events.append((name, begin, end))

    def seconds(self) -> dict[str, float]:
        """Seconds by name; call it once the batch's results are on the host."""
        total: defaultdict[str, float] = defaultdict(float)
        for name, stretch_s in self._stretches:
            total[name] += stretch_s
        for name, begin, end in self._events:
            total[name] += begin.elapsed_time(end) / 1000
        return dict(total)


_MOST_WORKERS = 8
_SAMPLE_STEP = 16
# torch has types for these since 2.8, but not everything that fails raises them.
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
_BROKEN = ("CUDA error", "device-side assert", "cuDNN error", "CUBLAS_STATUS_", "uncorrectable ECC")


class RewardEngine:
    """Scores pairs: each tower once per batch, each distinct image and prompt once. Not thread-safe.

    Args:
        evaluators: by name, in the order of the configuration
        batch_pairs: most pairs of one forward pass
    """

    def __init__(
        self, evaluators: Mapping[str, Evaluator], batch_pairs: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.evaluators = dict(evaluators)
        self.device, self.dtype = device, dtype
        self._batch_pairs = batch_pairs
        #: Told after each batch how many seconds each tower took.
        self.on_forward: Callable[[str, float], None] = _tell_nobody
        # Preparing images takes milliseconds each, which a GPU would wait for.
        workers = min(_MOST_WORKERS, os.cpu_count() or 1)
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="preprocess")

    def score(
        self, pairs: Sequence[Pair], names: Sequence[str] | None = None, *, deterministic: bool = False
    ) -> list[PairScores]:
        """Raw scores in the order of the pairs.

        Args:
            names: evaluators to use; None for all
            deterministic: a forward pass of its own for every image and prompt, so that scores depend on
                nothing but the pair; slower on a GPU

        Raises:
            ScoringError: an evaluator fails on some pair, or its score is not finite
            OutOfMemoryError: the device has no room for so many pairs
            FatalDeviceError: the device is broken
        """
        chosen = [self.evaluators[name] for name in (self.evaluators if names is None else names)]
        scores: list[PairScores] = []
        try:
            for start in range(0, len(pairs), self._batch_pairs):
                scores += self._batch(pairs[start : start + self._batch_pairs], chosen, deterministic)
            return scores
        except (RuntimeError, MemoryError) as error:
            if (fault := device_fault(error)) is None:
                raise
        # Out of the handler: with the error's traceback go the tensors of the failed pass.
        if isinstance(fault, OutOfMemoryError) and self.device.type == "cuda":
            torch.cuda.empty_cache()
        raise fault

    def prepare(self, pairs: Sequence[Pair], names: Sequence[str] | None = None) -> list[Pair]:
        """The pairs with their images ready for the towers: while `score` runs, on any thread.

        An image that cannot be prepared stays as it is, and its error comes when it is scored.
        """
        ways = {self.evaluators[name].preprocessing for name in (self.evaluators if names is None else names)}
        images, rows = distinct([pair.image for pair in pairs])
        inputs = list(self._workers.map(partial(_inputs, ways), images))
        return [replace(pair, inputs=inputs[row]) for pair, row in zip(pairs, rows, strict=True)]

    def forget(self, prompt: str) -> None:
        """Compute a prompt anew the next time."""
        for evaluator in self.evaluators.values():
            evaluator.tower.forget_text(prompt)

    def warm_up(self) -> None:
        """Score one grey image, so that the first request finds everything allocated.

        Raises:
            ScoringError: the models do not give numbers
        """
        size = max(evaluator.preprocessing.size_px for evaluator in self.evaluators.values())
        grey = torch.full((size, size, 3), 128, dtype=torch.uint8).numpy()
        self.score([Pair("an image", grey)])

    @torch.inference_mode()
    def _batch(
        self, pairs: Sequence[Pair], chosen: Sequence[Evaluator], deterministic: bool
    ) -> list[PairScores]:
        clock = Stopwatch(self.device)
        images = self._embed_images(pairs, chosen, deterministic, clock)
        texts = self._embed_texts(pairs, chosen, deterministic, clock)
        raw = {}
        for evaluator in chosen:
            with _blaming(evaluator.name):
                text = _vectors(texts, evaluator)
                raw[evaluator.name] = _raw(evaluator, images[evaluator.name], text, deterministic)
        self._check_finite(raw)
        for tower, seconds in clock.seconds().items():
            self.on_forward(tower, seconds)
        cut = [any(text.truncated[row] for text in texts.values()) for row in range(len(pairs))]
        return [
            PairScores({name: scores[row] for name, scores in raw.items()}, cut[row])
            for row in range(len(pairs))
        ]

    def _embed_images(
        self, pairs: Sequence[Pair], chosen: Sequence[Evaluator], deterministic: bool, clock: Stopwatch
    ) -> dict[str, Tensor]:
        """Unit embeddings by evaluator; equal pixels are made once and equal forward passes run once."""
        images, rows = distinct([pair.image for pair in pairs])
        inputs = [pairs[rows.index(row)].inputs for row in range(len(images))]
        pixels: dict[Preprocessing, Tensor] = {}
        embedded: dict[tuple[str, Preprocessing], Tensor] = {}
        by_evaluator = {}
        for evaluator in chosen:
            with _blaming(evaluator.name):
                way = evaluator.preprocessing.shared(images)
                if way not in pixels:
                    pixels[way] = self._on_device(self._pixels(way, images, inputs))
                key = (evaluator.tower_name, way)
                if key not in embedded:
                    with clock(evaluator.tower_name):
                        vectors = evaluator.tower.embed_images(pixels[way], deterministic=deterministic)
                    embedded[key] = vectors[rows]
                by_evaluator[evaluator.name] = embedded[key]
        return by_evaluator

    def _pixels(
        self, way: Preprocessing, images: Sequence[Pixels], inputs: Sequence[Mapping[Preprocessing, Tensor]]
    ) -> Tensor:
        """float32 (N, 3, size_px, size_px), of what is ready and of what is made here."""
        ready = [of.get(way.shared([image])) for image, of in zip(images, inputs, strict=True)]
        missing = [image for image, tensor in zip(images, ready, strict=True) if tensor is None]
        if len(missing) == len(images):
            return way(images, self._workers.map)
        made = iter(way(missing, self._workers.map) if missing else ())
        return torch.stack([next(made) if tensor is None else tensor for tensor in ready])

    def _on_device(self, pixels: Tensor) -> Tensor:
        # From pinned memory a GPU fetches by itself, while the CPU prepares the next evaluator's pixels.
        return (
            pixels.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else pixels
        )

    def _embed_texts(
        self, pairs: Sequence[Pair], chosen: Sequence[Evaluator], deterministic: bool, clock: Stopwatch
    ) -> dict[str, TextEmbeddings]:
        prompts = [pair.prompt for pair in pairs]
        texts: dict[str, TextEmbeddings] = {}
        for evaluator in chosen:
            name, tower = evaluator.tower_name, evaluator.tower
            if evaluator.reads_prompt and name not in texts:
                with _blaming(evaluator.name), clock(name):
                    texts[name] = tower.embed_texts(
                        prompts, batch=self._batch_pairs, deterministic=deterministic
                    )
        return texts

    def _check_finite(self, raw: Mapping[str, Sequence[float]]) -> None:
        for name, scores in raw.items():
            if not torch.isfinite(torch.tensor(scores)).all():
                raise ScoringError(f"evaluator {name} gave a score that is not a finite number", name)


def _inputs(ways: Iterable[Preprocessing], image: Pixels) -> dict[Preprocessing, Tensor]:
    found: dict[Preprocessing, Tensor] = {}
    for way in {way.shared([image]) for way in ways}:
        with suppress(Exception):
            found[way] = way([image])[0]
    return found


def device_fault(error: BaseException) -> OutOfMemoryError | FatalDeviceError | None:
    """What an error of torch's says about the device; None if it says nothing.

    The message is torch's first line: later ones are advice on environment variables.
    """
    message = one_line(str(error).strip().partition("\n")[0])[:300] or type(error).__name__
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _says(error, _NO_MEMORY):
        return OutOfMemoryError(message)
    if isinstance(error, torch.AcceleratorError) or _says(error, _BROKEN):
        return FatalDeviceError(message)
    return None


def _tell_nobody(_tower: str, _seconds: float) -> None:
    pass


def _says(error: BaseException, phrases: Sequence[str]) -> bool:
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in phrases)


@contextmanager
def _blaming(name: str) -> Iterator[None]:
    """Say of any failure which evaluator it is of; the device's own faults are nobody's."""
    try:
        yield
    except Exception as error:
        if device_fault(error) is not None:
            raise
        raise ScoringError(f"evaluator {name} failed ({one_line(error)[:160]})", name) from error


def _vectors(texts: Mapping[str, TextEmbeddings], evaluator: Evaluator) -> Tensor | None:
    return texts[evaluator.tower_name].vectors if evaluator.reads_prompt else None


def _raw(evaluator: Evaluator, image: Tensor, text: Tensor | None, deterministic: bool) -> list[float]:
    # A GPU sums a row in an order that depends on how many rows there are.
    rows = [slice(row, row + 1) for row in range(len(image))] if deterministic else [slice(None)]
    parts = [evaluator.score(image[row], None if text is None else text[row]) for row in rows]
    scores: list[float] = torch.cat(parts).tolist()
    return scores


def distinct(images: Sequence[Pixels]) -> tuple[list[Pixels], list[int]]:
    """The different images, and for each image where its equal is among them.

    One comparison an image at most: a repetition may be missed, which costs time, but none is invented.
    """
    kept: list[Pixels] = []
    places: dict[tuple[tuple[int, ...], bytes], int] = {}
    rows = []
    for image in images:
        # A sample of the pixels finds the candidate in microseconds; the whole image decides.
        key = image.shape, image[::_SAMPLE_STEP, ::_SAMPLE_STEP].tobytes()
        if key not in places or not np.array_equal(kept[places[key]], image):
            places[key] = len(kept)
            kept.append(image)
        rows.append(places[key])
    return kept, rows
