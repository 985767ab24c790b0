"""All models of the miniature from one seed, stage by stage.

A finished stage is kept in the work folder, so that an interrupted build resumes. Every stage has its own
random streams, so that the order of the stages does not matter. Results repeat on one machine; the rounding
of another processor gives slightly different models.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import PriorTransformer, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModelWithProjection, CLIPTokenizer

from miniature import evaluators, generator, layout, probe, tokenizer, world
from miniature.fitting import Pool
from miniature.world import Part
from trainer.data.near_duplicates import jaccard

M = TypeVar("M", bound=nn.Module)

# Optimizer steps of each stage at effort 1, and images drawn for each part of the world.
STEPS = {
    "clip": 900,
    "aesthetic": 1500,
    "preference base": 700,
    "preference": 400,
    "generator clip": 700,
    "prior": 900,
    "decoder": 1200,
    "super-resolution": 300,
    "probe": 1200,
}
POOL = {Part.EVALUATORS: 40_000, Part.GENERATOR: 60_000}
TRAIN_PROMPTS, VALIDATION_PROMPTS = 256, 96
HEADER = "# Captions of the miniature world, one a line. Written by `python -m miniature build`. CC0 1.0."
NEAR_DUPLICATE = 0.77  # largest Jaccard similarity of a test prompt to any other prompt

Content = tuple[int, ...]  # of a scene: shape, figure, background, size, texture


@dataclass
class Build:
    """One build; `effort` scales the number of optimizer steps, and 0.01 takes a minute (for tests)."""

    work: Path
    seed: int = 0
    effort: float = 1.0

    def steps(self, stage: str) -> int:
        """Return the number of optimizer steps of a stage at this effort."""
        return max(2, round(STEPS[stage] * self.effort))

    def stream(self, number: int) -> torch.Generator:
        """Return the random generator of a stage, independent of other stages."""
        return torch.Generator().manual_seed(1000 * self.seed + number)

    @cached_property
    def words(self) -> CLIPTokenizer:
        """The world's tokenizer."""
        tokenizer.save_hf(self.work / "tokenizer")
        return CLIPTokenizer.from_pretrained(self.work / "tokenizer")

    @cached_property
    def evaluators_pool(self) -> Pool:
        """Scenes of the evaluators' part."""
        return self._pool(Part.EVALUATORS, 1)

    @cached_property
    def generator_pool(self) -> Pool:
        """Scenes of the generator's part."""
        return self._pool(Part.GENERATOR, 11)

    def _pool(self, part: Part, stream: int) -> Pool:
        return Pool.drawn(max(2000, round(POOL[part] * min(1.0, self.effort))), part, self.stream(stream))

    # The evaluators ---------------------------------------------------------------------------------

    @cached_property
    def clip(self) -> CLIPModel:
        """CLIP that the evaluators clip and aesthetic share."""
        return self._clip("clip", "quick_gelu", "clip", 2, "evaluators_pool")

    @cached_property
    def preference_base(self) -> CLIPModel:
        """CLIP that both preference models are fine-tuned from."""
        return self._clip("base", "gelu", "preference base", 4, "evaluators_pool")

    @cached_property
    def aesthetic(self) -> nn.Sequential:
        """The aesthetic head."""
        path = self.work / "aesthetic.pt"
        if not path.exists():
            head = evaluators.train_aesthetic(
                self.clip, self.evaluators_pool, self.steps("aesthetic"), self.stream(3)
            )
            torch.save(head.state_dict(), path)
        head = evaluators.aesthetic_head()
        head.load_state_dict(torch.load(path, weights_only=True))
        return head

    @cached_property
    def pickscore(self) -> CLIPModel:
        """The miniature's PickScore."""
        return self._preference("pickscore", 5)

    @cached_property
    def hpsv2(self) -> CLIPModel:
        """The miniature's HPSv2."""
        return self._preference("hpsv2", 6)

    def _preference(self, kind: str, stream: int) -> CLIPModel:
        def train() -> CLIPModel:
            base = deepcopy(self.preference_base)
            return evaluators.train_preference(
                kind, base, self.evaluators_pool, self.words, self.steps("preference"), self.stream(stream)
            )

        return self._kept(kind, CLIPModel, train)

    def _clip(self, name: str, activation: str, stage: str, stream: int, pool: str) -> CLIPModel:
        def train() -> CLIPModel:
            config = evaluators.clip_config(activation)
            return evaluators.train_clip(
                stage, getattr(self, pool), self.words, config, self.steps(stage), self.stream(stream)
            )

        return self._kept(name, CLIPModel, train)

    def _kept(self, name: str, kind: type[M], train: Callable[[], M]) -> M:
        folder = self.work / name
        if not (folder / "config.json").exists():
            train().save_pretrained(folder)  # type: ignore[operator]
        model: M = kind.from_pretrained(folder)  # type: ignore[attr-defined]
        return model.eval()

    # The generator ------------------------------------------------------------------------------

    @cached_property
    def generator_clip(self) -> CLIPModel:
        """The generator's own CLIP: its text half is shipped, its image half defines the prior's targets."""
        return self._clip("gclip", "quick_gelu", "generator clip", 12, "generator_pool")

    @cached_property
    def encoder(self) -> CLIPTextModelWithProjection:
        """Karlo's text encoder."""
        return generator.text_encoder(self.generator_clip)

    @cached_property
    def embeddings(self) -> Tensor:
        """(N, E) image embeddings of the generator's scenes."""
        return generator.image_embeddings(self.generator_clip, self.generator_pool)

    @cached_property
    def prior(self) -> PriorTransformer:
        """Karlo's prior."""

        def train() -> PriorTransformer:
            return generator.train_prior(
                self.encoder,
                self.words,
                self.generator_pool,
                self.embeddings,
                self.steps("prior"),
                self.stream(13),
            )

        return self._kept("prior", PriorTransformer, train)

    @cached_property
    def decoder(self) -> generator.DecoderWithProjection:
        """Karlo's decoder and text projection."""
        if not (self.work / "decoder" / "config.json").exists():
            trained = generator.train_decoder(
                self.encoder,
                self.words,
                self.generator_pool,
                self.embeddings,
                self.steps("decoder"),
                self.stream(14),
            )
            trained.text_proj.save_pretrained(self.work / "text_proj")
            trained.unet.save_pretrained(self.work / "decoder")
        model = generator.DecoderWithProjection()
        model.text_proj = UnCLIPTextProjModel.from_pretrained(self.work / "text_proj")
        model.unet = UNet2DConditionModel.from_pretrained(self.work / "decoder")
        return model.eval()

    @cached_property
    def super_resolution(self) -> tuple[UNet2DModel, UNet2DModel]:
        """The first and the last super-resolution UNet."""
        first, last = self.work / "srf", self.work / "srl"
        if not (last / "config.json").exists():
            trained = generator.train_super_resolution(
                self.generator_pool, self.steps("super-resolution"), self.stream(15)
            )
            for model, folder in zip(trained, (first, last), strict=True):
                model.save_pretrained(folder)
        return UNet2DModel.from_pretrained(first).eval(), UNet2DModel.from_pretrained(last).eval()

    # The probe --------------------------------------------------------------------------------

    @cached_property
    def probe(self) -> probe.Probe:
        """The probe, an independent CNN."""
        path = self.work / "probe.safetensors"
        if not path.exists():
            pools = [self.evaluators_pool, self.generator_pool]
            probe.save_probe(probe.train_probe(pools, self.steps("probe"), self.stream(21)), path)
        return probe.load_probe(path)


def write_evaluators(build: Build, models: Path) -> None:
    """Write clip/, aesthetic/, pickscore/ and hps/."""
    layout.write_clip(build.clip, models / "clip")
    layout.write_aesthetic(build.aesthetic, models / "aesthetic")
    layout.write_clip(build.pickscore, models / "pickscore")
    layout.write_hps(build.hpsv2, models / "hps")


def write_generator(build: Build, models: Path) -> None:
    """Write karlo/."""
    layout.write_karlo_text(build.encoder, models / "karlo")
    layout.write_prior(build.prior, models / "karlo")
    layout.write_decoder(build.decoder, models / "karlo")
    layout.write_super_resolution(*build.super_resolution, models / "karlo")


def write_probe(build: Build, models: Path) -> None:
    """Write probe/."""
    probe.save_probe(build.probe, models / "probe" / "model.safetensors")


def write_prompts(folder: Path, seed: int = 0) -> None:
    """Write training prompts of the generator's part; validation and test prompts of the held-out part."""
    rng = torch.Generator().manual_seed(1000 * seed + 31)
    train = distinct_captions(Part.GENERATOR, TRAIN_PROMPTS, rng)
    validation = distinct_captions(Part.HELD_OUT, VALIDATION_PROMPTS, rng)
    folder.mkdir(parents=True, exist_ok=True)
    for name, captions in (
        ("train.txt", train),
        ("validation.txt", validation),
        ("test.txt", distant_captions(Part.HELD_OUT, validation, rng)),
    ):
        (folder / name).write_text("\n".join([HEADER, *captions.values()]) + "\n")


def distinct_captions(part: Part, count: int, rng: torch.Generator) -> dict[Content, str]:
    """Return captions by content, all distinct, most of them stating size and texture."""
    found: dict[Content, str] = {}
    while len(found) < count:
        for content, text in _captions(part, count, rng):
            found.setdefault(content, text)
    first: dict[str, Content] = {}
    for content, text in found.items():
        first.setdefault(text, content)
    return {content: text for text, content in list(first.items())[:count]}


def distant_captions(part: Part, others: dict[Content, str], rng: torch.Generator) -> dict[Content, str]:
    """Return one caption for each combination of shape and colours, unlike the others in content and wording.

    No two captions are near-duplicates.
    """
    found: dict[tuple[int, ...], tuple[Content, str]] = {}
    texts = list(others.values())
    while len(found) < len(world.combinations(part)):
        for content, text in _captions(part, 1, rng):
            if content[:3] in found or content in others:
                continue
            if max(jaccard(text, other) for other in texts) < NEAR_DUPLICATE:
                found[content[:3]] = content, text
                texts.append(text)
    return dict(found.values())


def _captions(part: Part, count: int, rng: torch.Generator) -> Iterator[tuple[Content, str]]:
    scenes = world.sample_scenes(count, part, rng)
    captions = world.describe(scenes, rng, drop=0.2)
    yield from zip(map(tuple, scenes.content.tolist()), captions.text, strict=True)
