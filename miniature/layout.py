"""Writers of the models in the published checkpoints' own layouts, for the real loaders.

====================  ==========================================================  =========================
folder                looks like                                                  files
====================  ==========================================================  =========================
`karlo/`            `kakaobrain/karlo-v1-alpha`                               ten subfolders, model_index
`clip/`             `openai/clip-vit-large-patch14`                           transformers CLIPModel
`aesthetic/`        LAION's `sac+logos+ava1-l14-linearMSE.pth`                state dict
`pickscore/`        `yuvalkirstain/PickScore_v1`                              transformers CLIPModel
`hps/`              `xswu/HPSv2`                                              {"state_dict": …}, open_clip
====================  ==========================================================  =========================

Tensors are stored in half precision, which halves the repository; everything computes in float32.
"""

import json
from pathlib import Path

import torch
from diffusers import ModelMixin, PriorTransformer, UNet2DModel
from torch import nn
from transformers import CLIPModel, CLIPTextModelWithProjection

from miniature import evaluators, generator, tokenizer, world
from reward_service.engine.weights import convert_config, convert_state_dict

AESTHETIC_FILE = "sac+logos+ava1-l14-linearMSE.pth"
HPS_FILE = "HPS_miniature.pt"

_MODEL_INDEX = {
    "_class_name": "UnCLIPPipeline",
    "_diffusers_version": "0.15.0.dev0",
    "decoder": ["diffusers", "UNet2DConditionModel"],
    "decoder_scheduler": ["diffusers", "UnCLIPScheduler"],
    "prior": ["diffusers", "PriorTransformer"],
    "prior_scheduler": ["diffusers", "UnCLIPScheduler"],
    "super_res_first": ["diffusers", "UNet2DModel"],
    "super_res_last": ["diffusers", "UNet2DModel"],
    "super_res_scheduler": ["diffusers", "UnCLIPScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_proj": ["unclip", "UnCLIPTextProjModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
}


def write_clip(model: CLIPModel, folder: Path) -> None:
    """Write a CLIPModel with its tokenizer and preprocessing, as on the hub."""
    model.half().save_pretrained(folder)
    model.float()
    tokenizer.save_hf(folder)
    size = world.SIZE_PX
    preprocessing = {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(evaluators.MEAN),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(evaluators.STD),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }
    _write_json(folder / "preprocessor_config.json", preprocessing)


def write_aesthetic(head: nn.Sequential, folder: Path) -> None:
    """Write the head as LAION saved it: a bare state dict, layers.0, 2, 4, 6, 7."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"layers.{name}": tensor.clone() for name, tensor in head.state_dict().items()}
    torch.save(state, folder / AESTHETIC_FILE)


def write_hps(model: CLIPModel, folder: Path) -> None:
    """Write the preference model under open_clip's names in a training checkpoint, as HPSv2 was published."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.to_json_file(folder / "config.json", use_diff=False)
    architecture = convert_config(folder / "config.json")
    (folder / "config.json").unlink()
    state = {name: tensor.half() for name, tensor in convert_state_dict(model.state_dict()).items()}
    torch.save({"state_dict": state}, folder / HPS_FILE)
    preprocessing = {"mean": list(evaluators.MEAN), "std": list(evaluators.STD)}
    _write_json(
        folder / "open_clip_config.json", {"model_cfg": architecture, "preprocess_cfg": preprocessing}
    )
    tokenizer.save_open_clip(folder / "bpe_simple_vocab.txt.gz")


def write_karlo_text(encoder: CLIPTextModelWithProjection, folder: Path) -> None:
    """Write the text encoder, its tokenizer, and the pipeline's index."""
    encoder.half().save_pretrained(folder / "text_encoder")
    encoder.float()
    tokenizer.save_hf(folder / "tokenizer")
    _write_json(folder / "model_index.json", _MODEL_INDEX)


def write_prior(prior: PriorTransformer, folder: Path) -> None:
    """Write the prior and its scheduler."""
    _save(prior, folder / "prior")
    generator.prior_scheduler().save_pretrained(folder / "prior_scheduler")


def write_decoder(model: generator.DecoderWithProjection, folder: Path) -> None:
    """Write the decoder, its text projection and its scheduler."""
    _save(model.unet, folder / "decoder")
    _save(model.text_proj, folder / "text_proj")
    generator.decoder_scheduler().save_pretrained(folder / "decoder_scheduler")


def write_super_resolution(first: UNet2DModel, last: UNet2DModel, folder: Path) -> None:
    """Write both super-resolution UNets and their scheduler."""
    _save(first, folder / "super_res_first")
    _save(last, folder / "super_res_last")
    generator.super_resolution_scheduler().save_pretrained(folder / "super_res_scheduler")


def _save(model: ModelMixin, folder: Path) -> None:
    """Save in half precision, without the source path that diffusers records."""
    model.half().save_pretrained(folder)
    model.float()
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    described.pop("_name_or_path", None)
    _write_json(folder / "config.json", described)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
