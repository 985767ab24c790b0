"""From prompts to images: text, prior, policy, super-resolution; each image from its own streams."""

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
    Text,
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

TEXT_CACHE = 2048  # prompts; a quarter of a MB each with real Karlo
NOTHING_SHARED = Sharing(prior="image", decoder_start="image", super_res="image")
PRIOR_CACHE = 32768  # embeddings; 3 kB each with real Karlo


class SampledImages(NamedTuple):
    """N images and how they came about."""

    images: Images  # (N, H, W, 3) uint8
    trajectory: Trajectory
    condition: Condition


class ImageSampler:
    """Draws images with Karlo and the policy; keeps text and prior embeddings that come up again."""

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
        self._texts: _Cache[str, Text] = _Cache(TEXT_CACHE)
        self._embeddings: _Cache[int, Tensor] = _Cache(PRIOR_CACHE)
        self._unconditional = encode_text(karlo, [""])

    def draw(
        self,
        keys: Sequence[ImageKey],
        sharing: Sharing = NOTHING_SHARED,
        stage: ImageStage = "super_resolution",
    ) -> SampledImages:
        """One image a key, in one batch; `sharing` says which of them get the same random numbers.

        With stage "decoder" the images are the decoder's own, and super-resolution is not run.
        """
        condition = self._condition(keys, sharing.prior)
        trajectory = self.policy.sample(
            condition,
            [key.stream("decoder") for key in keys],
            [key.stream("decoder_start", sharing.decoder_start) for key in keys],
        )
        images = trajectory.latents[:, -1].clamp(-1, 1)
        if stage == "super_resolution":
            images = self.enlarge(images, keys, sharing)
        return SampledImages(to_uint8(images).numpy(), trajectory, condition)

    def enlarge(self, images_small: Tensor, keys: Sequence[ImageKey], sharing: Sharing) -> Tensor:
        """Super-resolution of the decoder's images (N, 3, h, w) in [-1, 1], each from its own stream."""
        streams = [key.stream("super_resolution", sharing.super_res) for key in keys]
        return super_resolve(self._karlo, images_small, streams, self._sampling.super_res_steps)

    def resting(self) -> AbstractContextManager[None]:
        """Nothing is drawn within this context: what the policy does not need may leave the device."""
        return self._karlo.decoder_only() if self._offload == "idle" else nullcontext()

    def _condition(self, keys: Sequence[ImageKey], share: Share) -> Condition:
        text = self._text([key.prompt for key in keys])
        embeddings = torch.cat(self._image_embeddings(keys, share))
        guided = self._sampling.decoder_guidance > 1
        return decoder_condition(self._karlo, text, self._unconditional, embeddings, guided)

    def _text(self, prompts: Sequence[str]) -> Text:
        rows = self._texts.get_all(prompts, self._encode)
        return Text(*(torch.cat(field) for field in zip(*rows, strict=True)))

    def _encode(self, prompts: Sequence[str]) -> list[Text]:
        # One at a time: what a cache keeps must not depend in its last digits on what was asked for with it,
        # or a run that was resumed, whose cache begins empty, would not be the same run to the bit.
        return [encode_text(self._karlo, [prompt]) for prompt in prompts]

    def _image_embeddings(self, keys: Sequence[ImageKey], share: Share) -> list[Tensor]:
        by_seed = {key.seed_of("prior", share): key for key in keys}

        def sample(seeds: Sequence[int]) -> list[Tensor]:
            embeddings = sample_prior(
                self._karlo,
                self._text([by_seed[seed].prompt for seed in seeds]),
                self._unconditional,
                [by_seed[seed].stream("prior", share) for seed in seeds],
                self._sampling.prior_steps,
                self._sampling.prior_guidance,
            )
            return list(embeddings.split(1))

        def by_prompt(seeds: Sequence[int]) -> list[Tensor]:
            groups = groupby(seeds, key=lambda seed: by_seed[seed].prompt)
            return [embedding for _, group in groups for embedding in sample(list(group))]

        # Embeddings of an evaluation, and those shared in the whole run, outlive the iteration; see _encode.
        outlive = share == "prompt" or any(key.iteration < 0 for key in keys)
        make = by_prompt if outlive else sample
        return self._embeddings.get_all([key.seed_of("prior", share) for key in keys], make)


class _Cache(Generic[K, V]):
    """The most recent `size` values; what is missing is made in one call."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[K, V] = OrderedDict()

    def get_all(self, keys: Sequence[K], make: Callable[[Sequence[K]], list[V]]) -> list[V]:
        """The values of the keys, in order; `make` gets the distinct missing keys."""
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
