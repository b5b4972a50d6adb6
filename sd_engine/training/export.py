"""Write a trained model as a diffusers folder: half precision safetensors and the configurations beside them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from sd_engine.clip import ClipTextEncoder
from sd_engine.config import ClipConfig, UNetConfig, VaeConfig
from sd_engine.keymaps import DIFFUSERS, Rule
from sd_engine.schedules import NoiseSchedule
from sd_engine.unet import UNet
from sd_engine.vae import Vae

# Our names to the folder's: the way back of `keymaps.DIFFUSERS`, which checks every name here.
_TO_DIFFUSERS: dict[str, tuple[Rule, ...]] = {
    "text_encoder": (
        (r"^(token|position)_embedding\.", r"text_model.embeddings.\1_embedding."),
        (r"^layers\.", "text_model.encoder.layers."),
        (r"^final_layer_norm\.", "text_model.final_layer_norm."),
        (r"\.(fc[12])\.", r".mlp.\1."),
    ),
    "unet": (
        (r"\.block\.", ".transformer_blocks.0."),
        (r"\.ff\.proj_in\.", ".ff.net.0.proj."),
        (r"\.ff\.proj_out\.", ".ff.net.2."),
        (r"\.to_out\.", ".to_out.0."),
        (r"\.downsample\.", ".downsamplers.0."),
        (r"\.upsample\.", ".upsamplers.0."),
    ),
    "vae": (
        (r"^(encoder\.levels\.\d+)\.resample\.", r"\1.downsamplers.0."),
        (r"^(decoder\.levels\.\d+)\.resample\.", r"\1.upsamplers.0."),
        (r"^encoder\.levels\.", "encoder.down_blocks."),
        (r"^decoder\.levels\.", "decoder.up_blocks."),
        (r"\.attention\.to_out\.", ".to_out.0."),
        (r"\.attention\.", "."),
    ),
}


def diffusers_name(component: str, ours: str) -> str:
    """The name that the folder layout has for our parameter. Raises ValueError if it would not come back."""
    theirs = ours
    for pattern, replacement in _TO_DIFFUSERS[component]:
        theirs = re.sub(pattern, replacement, theirs)
    if DIFFUSERS[component].rename(theirs) != ours:
        raise ValueError(f"{component} parameter {ours!r} would be written as {theirs!r}, and not be found again")
    return theirs


def _save(folder: Path, component: str, file: str, module: nn.Module, config: dict[str, Any]) -> None:
    (folder / component).mkdir(parents=True, exist_ok=True)
    tensors = {
        diffusers_name(component, name): value.detach().to(torch.float16).contiguous()
        for name, value in module.state_dict().items()
    }
    save_file(tensors, folder / component / file, metadata={"format": "pt"})
    _write(folder / component / "config.json", config)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def _text_config(config: ClipConfig, end_id: int) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_act": config.activation,
        "hidden_size": config.width, "intermediate_size": config.mlp_width, "layer_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_tokens, "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers, "projection_dim": config.width, "vocab_size": config.vocab_size,
        "bos_token_id": end_id - 1, "eos_token_id": end_id, "pad_token_id": end_id,
    }  # fmt: skip


def _unet_config(config: UNetConfig) -> dict[str, Any]:
    types = ["CrossAttn" if attention else "" for attention in config.attention]
    return {
        "_class_name": "UNet2DConditionModel", "act_fn": "silu", "attention_head_dim": list(config.heads),
        "block_out_channels": list(config.channels), "center_input_sample": False,
        "cross_attention_dim": config.context_width, "down_block_types": [f"{t}DownBlock2D" for t in types],
        "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": config.in_channels,
        "layers_per_block": config.blocks_per_level, "mid_block_scale_factor": 1, "norm_eps": 1e-5,
        "norm_num_groups": config.norm_groups, "out_channels": config.out_channels,
        "sample_size": config.sample_size, "up_block_types": [f"{t}UpBlock2D" for t in reversed(types)],
        "use_linear_projection": config.linear_projection,
    }  # fmt: skip


def _vae_config(config: VaeConfig, sample_size: int) -> dict[str, Any]:
    levels = len(config.channels)
    return {
        "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": list(config.channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels, "in_channels": config.image_channels,
        "latent_channels": config.latent_channels, "layers_per_block": config.blocks_per_level,
        "norm_num_groups": config.norm_groups, "out_channels": config.image_channels,
        "sample_size": sample_size, "scaling_factor": config.scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }  # fmt: skip


def _schedule_config(schedule: NoiseSchedule) -> dict[str, Any]:
    return {
        "_class_name": "DDIMScheduler", "beta_end": schedule.beta_end, "beta_schedule": schedule.beta_schedule,
        "beta_start": schedule.beta_start, "clip_sample": False, "num_train_timesteps": schedule.train_steps,
        "prediction_type": schedule.prediction, "set_alpha_to_one": schedule.set_alpha_to_one,
        "steps_offset": schedule.steps_offset, "timestep_spacing": schedule.spacing,
    }  # fmt: skip


_MODEL_INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def export(folder: Path, unet: UNet, text_encoder: ClipTextEncoder, vae: Vae, schedule: NoiseSchedule) -> None:
    """Write everything but the tokenizer, whose files are made before the training starts."""
    _write(folder / "model_index.json", _MODEL_INDEX)
    _write(folder / "scheduler" / "scheduler_config.json", _schedule_config(schedule))
    text = text_encoder.config
    _save(folder, "text_encoder", "model.safetensors", text_encoder, _text_config(text, text.vocab_size - 1))
    weights = "diffusion_pytorch_model.safetensors"
    _save(folder, "unet", weights, unet, _unet_config(unet.config))
    _save(folder, "vae", weights, vae, _vae_config(vae.config, unet.config.sample_size * vae.config.factor))
