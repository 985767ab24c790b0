"""Random streams: different keys are independent, shared keys are equal."""

import itertools
from dataclasses import replace

import torch

from trainer.runtime.rng import ImageKey

KEY = ImageKey(seed=1, fold=0, iteration=3, prompt="a red ring", image=2)


def test_stream_depends_on_every_part_of_the_key() -> None:
    """No two images, stages, folds, iterations or runs have the same noise."""
    others = [
        KEY,
        replace(KEY, seed=2),
        replace(KEY, fold=1),
        replace(KEY, iteration=4),
        replace(KEY, prompt="a red ring "),
        replace(KEY, image=3),
    ]
    streams = [
        torch.randn(4096, generator=key.stream(stage))
        for key in others
        for stage in ("prior", "decoder", "super_resolution")
    ]
    for a, b in itertools.combinations(streams, 2):
        correlation = torch.corrcoef(torch.stack([a, b]))[0, 1]
        assert abs(correlation) < 0.1


def test_stream_restarts_on_every_call() -> None:
    """The same key gives the same numbers, in this process and in any other."""
    first = torch.randn(3, generator=KEY.stream("decoder"))
    assert torch.equal(first, torch.randn(3, generator=KEY.stream("decoder")))
    assert KEY.seed_of("decoder") == 171129063690748309


def test_shared_stream_ignores_shared_parts_of_the_key() -> None:
    """Share "group" spans the images of a group, "prompt" also the iterations; prompts never share."""
    other_image, other_iteration = replace(KEY, image=5), replace(KEY, iteration=9)
    assert KEY.seed_of("prior", "group") == other_image.seed_of("prior", "group")
    assert KEY.seed_of("prior", "group") != other_iteration.seed_of("prior", "group")
    assert KEY.seed_of("prior", "prompt") == other_iteration.seed_of("prior", "prompt")
    assert KEY.seed_of("prior", "prompt") != replace(KEY, prompt="x").seed_of("prior", "prompt")
