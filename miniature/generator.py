"""The generator's models: a small Karlo, stage by stage, in diffusers' own classes.

They are trained on the generator's part of the world only, with images of every quality, and are imperfect
on purpose: they also generate blur, fading and noise.
"""

from copy import deepcopy
from dataclasses import dataclass

import torch
from diffusers import PriorTransformer, UnCLIPScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTextModelWithProjection, CLIPTokenizer

from miniature import evaluators, tokenizer, world
from miniature.evaluators import EMBED
from miniature.fitting import Pool, fit

DECODER_PX = 16
DROP_CAPTION = 0.1
EXTRA_TOKENS = 4
# Lengths of the transitions that the variance channels are trained for: of 6 to 25 denoising steps.
STRIDES = (40, 170)


@dataclass(frozen=True)
class Conditioning:
    """Frozen text side of a batch. hidden: (N, L, E); projected: (N, E); mask: (N, L) bool."""

    hidden: Tensor
    projected: Tensor
    mask: Tensor


def text_encoder(clip: CLIPModel) -> CLIPTextModelWithProjection:
    """Return the text half of a CLIP as Karlo stores it."""
    encoder = CLIPTextModelWithProjection(clip.config.text_config)
    parts = {k: v for k, v in clip.state_dict().items() if k.startswith(("text_model.", "text_projection."))}
    encoder.load_state_dict(parts)
    return encoder.eval().requires_grad_(False)


@torch.no_grad()
def condition(encoder: CLIPTextModelWithProjection, words: CLIPTokenizer, text: list[str]) -> Conditioning:
    """Encode captions exactly as UnCLIPPipeline does: padded to the full context, with the mask."""
    tokens = words(
        text, padding="max_length", max_length=words.model_max_length, truncation=True, return_tensors="pt"
    )
    out = encoder(tokens.input_ids)
    return Conditioning(out.last_hidden_state, out.text_embeds, tokens.attention_mask.bool())


def drop_captions(captions: list[str], rng: torch.Generator) -> tuple[list[str], Tensor]:
    """Replace a share of the captions by "" (for guidance); return them and the mask (N,) of dropped ones."""
    dropped = torch.rand(len(captions), generator=rng) < DROP_CAPTION
    return ["" if d else c for c, d in zip(captions, dropped.tolist(), strict=True)], dropped


@torch.no_grad()
def image_embeddings(clip: CLIPModel, pool: Pool) -> Tensor:
    """Return (N, E) unnormalised CLIP projections of all images of the pool."""
    chunks = torch.arange(len(pool.scenes)).split(512)
    return torch.cat([evaluators.embed_images(clip, pool.batch(index)[1]) for index in chunks])


# Prior --------------------------------------------------------------------------------------------


def train_prior(
    encoder: CLIPTextModelWithProjection,
    words: CLIPTokenizer,
    pool: Pool,
    embeddings: Tensor,
    steps: int,
    rng: torch.Generator,
) -> PriorTransformer:
    """Train the prior: from captions to standardised image embeddings, by diffusion that predicts x0."""
    torch.manual_seed(rng.initial_seed())
    prior = PriorTransformer(
        num_attention_heads=4,
        attention_head_dim=24,
        num_layers=3,
        embedding_dim=EMBED,
        num_embeddings=tokenizer.CONTEXT_LENGTH,
        additional_embeddings=4,
    )
    prior.clip_mean.data = embeddings.mean(0, keepdim=True)
    prior.clip_std.data = embeddings.std(0, keepdim=True)
    for statistic in (prior.clip_mean, prior.clip_std):
        statistic.requires_grad_(False)
    target = (embeddings - prior.clip_mean) / prior.clip_std
    scheduler = prior_scheduler()

    def loss_of_batch() -> Tensor:
        index = torch.randint(len(target), (192,), generator=rng)
        captions = world.describe(pool.scenes[index], rng, quality_share=0.2)
        conditioning = condition(encoder, words, drop_captions(captions.text, rng)[0])
        z0, t = target[index], torch.randint(1000, (len(index),), generator=rng)
        zt = scheduler.add_noise(z0, torch.randn(z0.shape, generator=rng), t)
        predicted = prior(
            zt,
            timestep=t,
            proj_embedding=conditioning.projected,
            encoder_hidden_states=conditioning.hidden,
            attention_mask=conditioning.mask,
        ).predicted_image_embedding
        return F.mse_loss(predicted, z0)

    return fit("prior", prior, loss_of_batch, steps, lr=1e-3, ema_decay=0.99)


def prior_scheduler() -> UnCLIPScheduler:
    """Return a scheduler that predicts the embedding itself, as Karlo's prior does."""
    return UnCLIPScheduler(
        variance_type="fixed_small_log", clip_sample=True, clip_sample_range=5.0, prediction_type="sample"
    )


# Decoder ------------------------------------------------------------------------------------------


class DecoderWithProjection(nn.Module):
    """The decoder UNet and its text projection, which are trained together."""

    def __init__(self) -> None:
        super().__init__()
        widths = (32, 64)
        self.text_proj = UnCLIPTextProjModel(
            clip_extra_context_tokens=EXTRA_TOKENS,
            clip_embeddings_dim=EMBED,
            time_embed_dim=4 * widths[0],
            cross_attention_dim=EMBED,
        )
        self.unet = UNet2DConditionModel(
            sample_size=DECODER_PX,
            in_channels=3,
            out_channels=6,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            block_out_channels=widths,
            layers_per_block=1,
            cross_attention_dim=EMBED,
            attention_head_dim=32,
            class_embed_type="identity",
            resnet_time_scale_shift="scale_shift",
            norm_num_groups=8,
        )

    def forward(
        self, x: Tensor, t: Tensor, image: Tensor, conditioning: Conditioning, dropped: Tensor
    ) -> Tensor:
        """Return noise and variance (N, 6, H, W); rows in `dropped` (N,) get the learned empty embedding."""
        empty = self.text_proj.learned_classifier_free_guidance_embeddings
        image = torch.where(dropped[:, None], empty[None], image)
        context, time_embedding = self.text_proj(
            image_embeddings=image,
            prompt_embeds=conditioning.projected,
            text_encoder_hidden_states=conditioning.hidden,
            do_classifier_free_guidance=False,
        )
        mask = F.pad(conditioning.mask, (EXTRA_TOKENS, 0), value=True)
        predicted: Tensor = self.unet(
            x, t, encoder_hidden_states=context, class_labels=time_embedding, attention_mask=mask
        ).sample
        return predicted


def decoder_scheduler() -> UnCLIPScheduler:
    """Return a scheduler that predicts noise and a variance between its bounds, as Karlo's decoder does."""
    return UnCLIPScheduler(
        variance_type="learned_range", clip_sample=True, clip_sample_range=1.0, prediction_type="epsilon"
    )


def train_decoder(
    encoder: CLIPTextModelWithProjection,
    words: CLIPTokenizer,
    pool: Pool,
    embeddings: Tensor,
    steps: int,
    rng: torch.Generator,
) -> DecoderWithProjection:
    """Train by noise prediction weighted by min-SNR-5, and a variational bound for the variance channels."""
    torch.manual_seed(rng.initial_seed())
    model = DecoderWithProjection()
    alpha_bar = decoder_scheduler().alphas_cumprod

    def loss_of_batch() -> Tensor:
        index = torch.randint(len(embeddings), (96,), generator=rng)
        scenes, pixels = pool.batch(index)
        x0 = F.adaptive_avg_pool2d(pixels, DECODER_PX)
        text, dropped = drop_captions(world.describe(scenes, rng, quality_share=0.2).text, rng)
        conditioning = condition(encoder, words, text)
        t = torch.randint(1000, (len(index),), generator=rng)
        stride = torch.randint(*STRIDES, (len(index),), generator=rng)
        noise = torch.randn(x0.shape, generator=rng)
        a_t = alpha_bar[t][:, None, None, None]
        xt = a_t.sqrt() * x0 + (1 - a_t).sqrt() * noise
        out = model(xt, t, embeddings[index], conditioning, dropped)
        predicted, v = out.split(3, dim=1)
        weight = (5 * (1 - a_t) / a_t).clamp(max=1.0)
        simple = (weight * (predicted - noise) ** 2).mean()
        t_previous = t - stride
        a_p = torch.where(t_previous >= 0, alpha_bar[t_previous.clamp(min=0)], 1.0)[:, None, None, None]
        bound = variance_bound(x0, xt, predicted.detach(), v, a_t, a_p)[t_previous >= 0].mean()
        loss: Tensor = simple + 0.3 * bound
        return loss

    return fit("decoder", model, loss_of_batch, steps, lr=1.5e-3, ema_decay=0.998)


def variance_bound(x0: Tensor, xt: Tensor, eps: Tensor, v: Tensor, a_t: Tensor, a_p: Tensor) -> Tensor:
    """Return KL(q(x_p | x_t, x0) || p(x_p | x_t)) in nats a dimension, (N, C, H, W).

    The transition of Nichol & Dhariwal (2021) with a stride; only the variance gets a gradient.
    """
    beta = 1 - a_t / a_p
    posterior = beta * (1 - a_p) / (1 - a_t)
    guess = ((xt - (1 - a_t).sqrt() * eps) / a_t.sqrt()).clamp(-1, 1)
    shift = a_p.sqrt() * beta / (1 - a_t) * (x0 - guess)
    log_q = posterior.clamp(min=1e-12).log()
    log_p = 0.5 * (v + 1) * beta.log() + 0.5 * (1 - v) * log_q
    return 0.5 * (log_p - log_q + (log_q - log_p).exp() + shift**2 * (-log_p).exp() - 1)


# Super-resolution ---------------------------------------------------------------------------------


def super_resolution_unet() -> UNet2DModel:
    """Return a UNet that reads the noisy and the upscaled image side by side."""
    return UNet2DModel(
        sample_size=world.SIZE_PX,
        in_channels=6,
        out_channels=3,
        down_block_types=("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        add_attention=False,
        norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
    )


def super_resolution_scheduler() -> UnCLIPScheduler:
    """Return a scheduler that predicts the image; noise prediction gives colour casts at this size."""
    return UnCLIPScheduler(
        variance_type="fixed_small_log", clip_sample=True, clip_sample_range=1.0, prediction_type="sample"
    )


def upscaled(small: Tensor) -> Tensor:
    """Upscale the decoder's images to (N, 3, 32, 32) as UnCLIPPipeline does."""
    return F.interpolate(
        small, size=[world.SIZE_PX, world.SIZE_PX], mode="bicubic", align_corners=False, antialias=True
    )


def train_super_resolution(pool: Pool, steps: int, rng: torch.Generator) -> tuple[UNet2DModel, UNet2DModel]:
    """Train the first UNet to denoise from any timestep, and the last to refine its output at t = 0."""
    torch.manual_seed(rng.initial_seed())
    scheduler = super_resolution_scheduler()

    def pair() -> tuple[Tensor, Tensor]:
        pixels = pool.batch(torch.randint(len(pool.scenes), (96,), generator=rng))[1]
        small = F.adaptive_avg_pool2d(pixels, DECODER_PX)
        disturbed = small + 0.04 * torch.randn(small.shape, generator=rng)
        return pixels, upscaled(disturbed.clamp(-1, 1))

    first = super_resolution_unet()

    def first_loss() -> Tensor:
        pixels, guide = pair()
        # Half of them at the start of the chain, which matters most with few steps.
        t = torch.randint(1000, (len(pixels),), generator=rng)
        t = torch.where(torch.rand(len(pixels), generator=rng) < 0.5, 999, t)
        xt = scheduler.add_noise(pixels, torch.randn(pixels.shape, generator=rng), t)
        return F.mse_loss(first(torch.cat([xt, guide], 1), t).sample, pixels)

    first = fit("super-resolution, first", first, first_loss, steps, lr=2e-3, ema_decay=0.99)
    last = deepcopy(first).requires_grad_(True)
    scheduler.set_timesteps(2)

    def last_loss() -> Tensor:
        pixels, guide = pair()
        with torch.no_grad():
            xt = torch.randn(pixels.shape, generator=rng)
            guess = first(torch.cat([xt, guide], 1), 999).sample
            x0 = scheduler.step(guess, 999, xt, prev_timestep=0, generator=rng).prev_sample
        return F.mse_loss(last(torch.cat([x0, guide], 1), 0).sample, pixels)

    last = fit("super-resolution, last", last, last_loss, steps // 2, lr=1e-3, ema_decay=0.99)
    return first, last
