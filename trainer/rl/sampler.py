"""Image sampler: text encoder, prior, decoder policy and super-resolution, one random stream per image."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from trainer.config import ImageStage, SamplingConfig, Share, Sharing
from trainer.rl.karlo import (
    Condition,
    Karlo,
    TextEncoding,
    decoder_condition,
    encode_text,
    sample_prior,
    super_resolve,
    to_uint8,
)
from trainer.rl.policy import DecoderPolicy, Trajectory
from trainer.rl.rewards import Images
from trainer.runtime.rng import ImageKey

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

TEXT_CACHE = 2048  # prompts; a quarter of a MB each with the published Karlo
PRIOR_CACHE = 32768  # embeddings; 3 kB each with the published Karlo
NOTHING_SHARED = Sharing(prior="image", decoder_start="image", super_res="image")


class SampledImages(NamedTuple):
    """N images with the trajectory and the condition they were sampled from."""

    images: Images  # (N, H, W, 3) uint8
    trajectory: Trajectory
    condition: Condition


class ImageSampler:
    """Samples images with Karlo and the policy; caches text and prior embeddings."""

    def __init__(
        self,
        karlo: Karlo,
        policy: DecoderPolicy,
        sampling: SamplingConfig,
        *,
        offload: Literal["none", "idle"] = "none",
    ) -> None:
        self.policy = policy
        self._offload = offload
        self._karlo = karlo
        self._sampling = sampling
        self._texts: _Cache[str, TextEncoding] = _Cache(TEXT_CACHE)
        self._embeddings: _Cache[int, Tensor] = _Cache(PRIOR_CACHE)
        self._unconditional = encode_text(karlo, [""])

    def sample(
        self,
        keys: Sequence[ImageKey],
        sharing: Sharing = NOTHING_SHARED,
        stage: ImageStage = "super_resolution",
    ) -> SampledImages:
        """Sample one image per key, in one batch.

        Args:
            keys: identities of the images, which determine their random streams
            sharing: stages in which images of a group have common random numbers
            stage: "decoder" returns the decoder's small images and does not run super-resolution
        """
        condition = self._condition(keys, sharing.prior)
        trajectory = self.policy.sample(
            condition,
            [key.stream("decoder") for key in keys],
            [key.stream("decoder_start", sharing.decoder_start) for key in keys],
        )
        images = trajectory.latents[:, -1].clamp(-1, 1)
        if stage == "super_resolution":
            images = self.upscale(images, keys, sharing)
        return SampledImages(to_uint8(images).numpy(), trajectory, condition)

    def upscale(self, images_small: Tensor, keys: Sequence[ImageKey], sharing: Sharing) -> Tensor:
        """Return the decoder's images (N, 3, h, w) in [-1, 1] after super-resolution, (N, 3, H, W)."""
        streams = [key.stream("super_resolution", sharing.super_res) for key in keys]
        return super_resolve(self._karlo, images_small, streams, self._sampling.super_res_steps)

    def offloaded(self) -> AbstractContextManager[None]:
        """Return a context without sampling, in which all networks but the decoder may leave the device."""
        return self._karlo.decoder_only() if self._offload == "idle" else nullcontext()

    def _condition(self, keys: Sequence[ImageKey], share: Share) -> Condition:
        text = self._text([key.prompt for key in keys])
        embeddings = torch.cat(self._image_embeddings(keys, share))
        guided = self._sampling.decoder_guidance > 1
        return decoder_condition(self._karlo, text, self._unconditional, embeddings, guided)

    def _text(self, prompts: Sequence[str]) -> TextEncoding:
        rows = self._texts.get_all(prompts, self._encode)
        return TextEncoding(*(torch.cat(field) for field in zip(*rows, strict=True)))

    def _encode(self, prompts: Sequence[str]) -> list[TextEncoding]:
        # One at a time: the last digits of an embedding depend on the batch. A cached value must not, or a
        # resumed run, whose cache starts empty, would not be bit-identical to an uninterrupted one.
        return [encode_text(self._karlo, [prompt]) for prompt in prompts]

    def _image_embeddings(self, keys: Sequence[ImageKey], share: Share) -> list[Tensor]:
        by_seed = {key.seed_of("prior", share): key for key in keys}

        def sample_batch(seeds: Sequence[int]) -> list[Tensor]:
            embeddings = sample_prior(
                self._karlo,
                self._text([by_seed[seed].prompt for seed in seeds]),
                self._unconditional,
                [by_seed[seed].stream("prior", share) for seed in seeds],
                self._sampling.prior_steps,
                self._sampling.prior_guidance,
            )
            return list(embeddings.split(1))

        def sample_by_prompt(seeds: Sequence[int]) -> list[Tensor]:
            groups = groupby(seeds, key=lambda seed: by_seed[seed].prompt)
            return [embedding for _, group in groups for embedding in sample_batch(list(group))]

        # Embeddings of an evaluation, and those shared in the whole run, are used again in later iterations:
        # they must not depend on the batch, see _encode.
        reused = share == "prompt" or any(key.iteration < 0 for key in keys)
        make = sample_by_prompt if reused else sample_batch
        return self._embeddings.get_all([key.seed_of("prior", share) for key in keys], make)


class _Cache(Generic[K, V]):
    """LRU cache of `size` values; missing values are computed in one call."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[K, V] = OrderedDict()

    def get_all(self, keys: Sequence[K], make: Callable[[Sequence[K]], list[V]]) -> list[V]:
        """Return the values of the keys, in order; `make` computes those of the distinct missing keys."""
        missing = [key for key in dict.fromkeys(keys) if key not in self._values]
        if missing:
            self._values.update(zip(missing, make(missing), strict=True))
        found = []
        for key in keys:
            self._values.move_to_end(key)
            found.append(self._values[key])
        while len(self._values) > self._size:
            self._values.popitem(last=False)
        return found
