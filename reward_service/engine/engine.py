"""Reward engine: raw scores of (prompt, image) pairs from evaluators over shared CLIP towers.

No web server and no queue.
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

from reward_service.engine.clip import TextEmbeddings, Tower
from reward_service.engine.evaluators import Evaluator
from reward_service.engine.preprocessing import Preprocessing
from reward_service.engine.tokenizer import Tokens
from reward_service.engine.types import (
    FatalDeviceError,
    OutOfMemoryError,
    Pair,
    PairScores,
    PromptError,
    ScoringError,
)
from reward_service.images import Pixels
from reward_service.settings import one_line

_MAX_WORKERS = 8
_SAMPLE_STRIDE = 16
# torch has exception types for these since 2.8, but not every failing operation raises them.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
_BROKEN_DEVICE = ("CUDA error", "device-side assert", "cuDNN error", "CUBLAS_STATUS_", "uncorrectable ECC")


class RewardEngine:
    """Score pairs: each tower runs once per batch, on each distinct image and prompt once. Not thread-safe.

    Args:
        evaluators: evaluators by name, in the order of the configuration
        batch_pairs: maximum number of pairs of one forward pass
        device: device of the towers
        dtype: dtype of the towers' trunks
    """

    def __init__(
        self, evaluators: Mapping[str, Evaluator], batch_pairs: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.evaluators = dict(evaluators)
        self.device, self.dtype = device, dtype
        self._batch_pairs = batch_pairs
        #: Called after each batch with the name of each tower and the seconds that it took.
        self.on_forward: Callable[[str, float], None] = _ignore_timing
        # Preprocessing takes milliseconds per image; a GPU would be idle meanwhile.
        workers = min(_MAX_WORKERS, os.cpu_count() or 1)
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="preprocess")

    def score(
        self, pairs: Sequence[Pair], names: Sequence[str] | None = None, *, deterministic: bool = False
    ) -> list[PairScores]:
        """Return raw scores in the order of the pairs.

        Args:
            pairs: pairs to score
            names: evaluators to use; None for all
            deterministic: run a separate forward pass for every image and prompt, so that scores depend on
                nothing but the pair; slower on a GPU

        Raises:
            ScoringError: an evaluator fails on a pair, or its score is not finite
            PromptError: a prompt cannot be tokenized
            OutOfMemoryError: the device has no memory for so many pairs
            FatalDeviceError: the device is broken
        """
        evaluators = [self.evaluators[name] for name in (self.evaluators if names is None else names)]
        scores: list[PairScores] = []
        try:
            for start in range(0, len(pairs), self._batch_pairs):
                batch = pairs[start : start + self._batch_pairs]
                scores += self.score_batch(batch, evaluators, deterministic)
            return scores
        except (RuntimeError, MemoryError) as error:
            if (fault := device_error(error)) is None:
                raise
        # Outside the handler: the error's traceback would keep the tensors of the failed pass alive.
        if isinstance(fault, OutOfMemoryError) and self.device.type == "cuda":
            torch.cuda.empty_cache()
        raise fault

    def prepare(self, pairs: Sequence[Pair], names: Sequence[str] | None = None) -> list[Pair]:
        """Return the pairs with preprocessed images; safe on any thread while `score` runs.

        Pairs that are prepared already stay as they are, so `names` must not have changed. An image that
        cannot be preprocessed stays as it is; `score` then raises its error.
        """
        evaluators = [self.evaluators[name] for name in (self.evaluators if names is None else names)]
        methods = {evaluator.preprocessing for evaluator in evaluators}
        missing = [pair for pair in pairs if not pair.preprocessed]
        images, rows = deduplicate_images([pair.image for pair in missing])
        # One image gains nothing from the workers, which are left to the pairs that `score` runs.
        map_function = map if len(images) == 1 else self._workers.map
        inputs = list(map_function(partial(_preprocess, methods), images))
        prepared = (replace(pair, preprocessed=inputs[row]) for pair, row in zip(missing, rows, strict=True))
        return [pair if pair.preprocessed else next(prepared) for pair in pairs]

    def tokenize(self, prompt: str, names: Sequence[str] | None = None) -> dict[str, Tokens]:
        """Return a prompt's tokens by tower; safe on any thread while `score` runs.

        Args:
            prompt: the prompt
            names: evaluators whose towers read it; None for all

        Raises:
            PromptError: the prompt cannot be tokenized
        """
        towers = {}
        for name in self.evaluators if names is None else names:
            if (evaluator := self.evaluators[name]).reads_prompt:
                towers[evaluator.tower_name] = evaluator.tower
        return {name: _tokenize(tower, prompt) for name, tower in towers.items()}

    def evict_prompt(self, prompt: str) -> None:
        """Remove a prompt from the towers' text caches, so that its next use computes it again."""
        for evaluator in self.evaluators.values():
            evaluator.tower.evict_text(prompt)

    def warm_up(self) -> None:
        """Score one grey image, so that the first request finds all memory allocated.

        Raises:
            ScoringError: the models do not return finite numbers
        """
        size = max(evaluator.preprocessing.size_px for evaluator in self.evaluators.values())
        grey = torch.full((size, size, 3), 128, dtype=torch.uint8).numpy()
        self.score([Pair("an image", grey)])

    @torch.inference_mode()
    def score_batch(
        self, pairs: Sequence[Pair], evaluators: Sequence[Evaluator], deterministic: bool
    ) -> list[PairScores]:
        """Return raw scores of one batch of at most `batch_pairs` pairs.

        Raises:
            ScoringError: an evaluator fails on a pair, or its score is not finite
        """
        stopwatch = Stopwatch(self.device)
        images = self._embed_images(pairs, evaluators, deterministic, stopwatch)
        texts = self._embed_texts(pairs, evaluators, deterministic, stopwatch)
        raw = {}
        for evaluator in evaluators:
            with _attribute_errors(evaluator.name):
                text = texts[evaluator.tower_name].vectors if evaluator.reads_prompt else None
                raw[evaluator.name] = _raw_scores(evaluator, images[evaluator.name], text, deterministic)
        self.check_finite(raw)
        for tower, seconds in stopwatch.seconds().items():
            self.on_forward(tower, seconds)
        truncated = [any(text.truncated[row] for text in texts.values()) for row in range(len(pairs))]
        return [
            PairScores({name: scores[row] for name, scores in raw.items()}, truncated[row])
            for row in range(len(pairs))
        ]

    @staticmethod
    def check_finite(raw: Mapping[str, Sequence[float]]) -> None:
        """Verify that the scores of every evaluator are finite.

        Raises:
            ScoringError: a score is NaN or infinite
        """
        for name, scores in raw.items():
            if not torch.isfinite(torch.tensor(scores)).all():
                raise ScoringError(f"evaluator {name} returned a score that is not a finite number", name)

    def _embed_images(
        self,
        pairs: Sequence[Pair],
        evaluators: Sequence[Evaluator],
        deterministic: bool,
        stopwatch: Stopwatch,
    ) -> dict[str, Tensor]:
        """Return unit embeddings (N, D) by evaluator; preprocess and embed nothing twice."""
        images, rows = deduplicate_images([pair.image for pair in pairs])
        preprocessed = [pairs[rows.index(row)].preprocessed for row in range(len(images))]
        pixels: dict[Preprocessing, Tensor] = {}
        embedded: dict[tuple[str, Preprocessing], Tensor] = {}
        by_evaluator = {}
        for evaluator in evaluators:
            with _attribute_errors(evaluator.name):
                method = evaluator.preprocessing.equivalent_for(images)
                if method not in pixels:
                    pixels[method] = self._to_device(self._pixels(method, images, preprocessed))
                key = (evaluator.tower_name, method)
                if key not in embedded:
                    with stopwatch(evaluator.tower_name):
                        vectors = evaluator.tower.embed_images(pixels[method], deterministic=deterministic)
                    embedded[key] = vectors[rows]
                by_evaluator[evaluator.name] = embedded[key]
        return by_evaluator

    def _pixels(
        self,
        method: Preprocessing,
        images: Sequence[Pixels],
        preprocessed: Sequence[Mapping[Preprocessing, Tensor]],
    ) -> Tensor:
        """Return float32 (N, 3, size_px, size_px); preprocess only images that are not ready yet."""
        ready = [
            tensors.get(method.equivalent_for([image]))
            for image, tensors in zip(images, preprocessed, strict=True)
        ]
        missing = [image for image, tensor in zip(images, ready, strict=True) if tensor is None]
        if len(missing) == len(images):
            return method(images, self._workers.map)
        computed = iter(method(missing, self._workers.map) if missing else ())
        return torch.stack([next(computed) if tensor is None else tensor for tensor in ready])

    def _to_device(self, pixels: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return pixels
        # A GPU copies from pinned memory on its own, while the CPU prepares the next evaluator's pixels.
        return pixels.pin_memory().to(self.device, non_blocking=True)

    def _embed_texts(
        self,
        pairs: Sequence[Pair],
        evaluators: Sequence[Evaluator],
        deterministic: bool,
        stopwatch: Stopwatch,
    ) -> dict[str, TextEmbeddings]:
        """Return the prompts' embeddings by tower."""
        texts: dict[str, TextEmbeddings] = {}
        for evaluator in evaluators:
            name, tower = evaluator.tower_name, evaluator.tower
            if evaluator.reads_prompt and name not in texts:
                rows = [pair.tokens.get(name) or _tokenize(tower, pair.prompt) for pair in pairs]
                with _attribute_errors(evaluator.name), stopwatch(name):
                    texts[name] = tower.embed_tokens(
                        rows, batch_size=self._batch_pairs, deterministic=deterministic
                    )
        return texts


def device_error(error: BaseException) -> OutOfMemoryError | FatalDeviceError | None:
    """Return the device error behind an exception of torch; None if the device is not at fault.

    The message is the first line of torch's: the later lines are advice on environment variables.
    """
    message = one_line(str(error).strip().partition("\n")[0])[:300] or type(error).__name__
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _mentions(error, _OUT_OF_MEMORY):
        return OutOfMemoryError(message)
    if isinstance(error, torch.AcceleratorError) or _mentions(error, _BROKEN_DEVICE):
        return FatalDeviceError(message)
    return None


def deduplicate_images(images: Sequence[Pixels]) -> tuple[list[Pixels], list[int]]:
    """Return the distinct images, and for each input image the index of its equal among them.

    Each image is compared with one candidate at most: a duplicate may be missed, which costs time, but two
    different images are never merged.
    """
    distinct: list[Pixels] = []
    index_by_key: dict[tuple[tuple[int, ...], bytes], int] = {}
    rows = []
    for image in images:
        # A sample of the pixels finds the candidate in microseconds; the full comparison decides.
        key = image.shape, image[::_SAMPLE_STRIDE, ::_SAMPLE_STRIDE].tobytes()
        if key not in index_by_key or not np.array_equal(distinct[index_by_key[key]], image):
            index_by_key[key] = len(distinct)
            distinct.append(image)
        rows.append(index_by_key[key])
    return distinct, rows


class Stopwatch:
    """Add up the seconds of named intervals of one batch, without synchronizing with the device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._intervals: list[tuple[str, float]] = []
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure the block of the `with` statement."""
        if not self._cuda:
            started_s = time.perf_counter()
            yield
            self._intervals.append((name, time.perf_counter() - started_s))
            return
        # The block only queues work on the GPU; events in the same queue measure when it really runs.
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._events.append((name, begin, end))

    def seconds(self) -> dict[str, float]:
        """Return seconds by name; call it only after the batch's results have been copied to the host."""
        total: defaultdict[str, float] = defaultdict(float)
        for name, interval_s in self._intervals:
            total[name] += interval_s
        for name, begin, end in self._events:
            total[name] += begin.elapsed_time(end) / 1000
        return dict(total)


def _tokenize(tower: Tower, prompt: str) -> Tokens:
    try:
        return tower.tokenizer(prompt)
    except MemoryError:
        raise
    except Exception as error:
        # Only the type of the error: its message could repeat the prompt.
        message = f"the prompt cannot be tokenized ({type(error).__name__}); send another"
        raise PromptError(message) from error


def _preprocess(methods: Iterable[Preprocessing], image: Pixels) -> dict[Preprocessing, Tensor]:
    tensors: dict[Preprocessing, Tensor] = {}
    for method in {method.equivalent_for([image]) for method in methods}:
        with suppress(Exception):
            tensors[method] = method([image])[0]
    return tensors


def _raw_scores(evaluator: Evaluator, image: Tensor, text: Tensor | None, deterministic: bool) -> list[float]:
    # A GPU adds up a row in an order that depends on the number of rows.
    rows = [slice(row, row + 1) for row in range(len(image))] if deterministic else [slice(None)]
    parts = [evaluator.score(image[row], None if text is None else text[row]) for row in rows]
    scores: list[float] = torch.cat(parts).tolist()
    return scores


@contextmanager
def _attribute_errors(name: str) -> Iterator[None]:
    """Raise any failure as a `ScoringError` of the evaluator `name`, except errors of the device itself."""
    try:
        yield
    except Exception as error:
        if device_error(error) is not None:
            raise
        raise ScoringError(f"evaluator {name} failed ({one_line(error)[:160]})", name) from error


def _mentions(error: BaseException, phrases: Sequence[str]) -> bool:
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in phrases)


def _ignore_timing(_tower: str, _seconds: float) -> None:
    pass
