"""Write a model as a diffusers folder: the weights of each component as safetensors, its configuration beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from sd_engine.config import ClipConfig, TinyDecoderConfig, UNetConfig, VaeConfig
from sd_engine.keymaps import diffusers_name
from sd_engine.model import Configs
from sd_engine.offload import Component
from sd_engine.schedules import NoiseSchedule
from sd_engine.tiny_decoder import TinyDecoder

_WEIGHTS: Mapping[Component, str] = {
    "text_encoder": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "tiny_decoder": "diffusion_pytorch_model.safetensors",
}


def write_folder(
    folder: Path, configs: Configs, modules: Mapping[Component, nn.Module], dtype: torch.dtype = torch.float16
) -> None:
    """Write everything but the tokenizer, in a form that the reference library loads strictly."""
    pipeline = "StableDiffusionInpaintPipeline" if configs.inpainting else "StableDiffusionPipeline"
    _write(folder / "model_index.json", {"_class_name": pipeline, **_MODEL_INDEX})
    _write(folder / "scheduler" / "scheduler_config.json", _schedule_config(configs.schedule))
    _write(folder / "text_encoder" / "config.json", _text_config(configs.text))
    _write(folder / "unet" / "config.json", unet_config(configs.unet))
    _write(folder / "vae" / "config.json", vae_config(configs.vae, configs.unet.sample_size * configs.vae.factor))
    for component, module in modules.items():
        _save(folder / component, component, module, dtype)


def write_tiny_decoder(folder: Path, decoder: TinyDecoder, dtype: torch.dtype = torch.float16) -> None:
    """Write it as diffusers' AutoencoderTiny, without the encoder that such a folder also has."""
    _write(folder / "config.json", _tiny_decoder_config(decoder.config))
    _save(folder, "tiny_decoder", decoder, dtype)


def _save(folder: Path, component: Component, module: nn.Module, dtype: torch.dtype) -> None:
    tensors = {
        diffusers_name(component, name): value.detach().to("cpu", dtype).contiguous()
        for name, value in module.state_dict().items()
    }
    save_file(tensors, folder / _WEIGHTS[component], metadata={"format": "pt"})


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _text_config(config: ClipConfig) -> dict[str, Any]:
    end_id = config.vocab_size - 1
    return {
        "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_act": config.activation,
        "hidden_size": config.width, "intermediate_size": config.mlp_width, "layer_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_tokens, "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers, "projection_dim": config.width, "vocab_size": config.vocab_size,
        "bos_token_id": end_id - 1, "eos_token_id": end_id, "pad_token_id": end_id,
    }  # fmt: skip


def unet_config(config: UNetConfig) -> dict[str, Any]:
    """As the reference writes it."""
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


def vae_config(config: VaeConfig, sample_size: int) -> dict[str, Any]:
    """As the reference writes it. sample_size: pixels that the model was trained at."""
    levels = len(config.channels)
    return {
        "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": list(config.channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels, "in_channels": config.image_channels,
        "latent_channels": config.latent_channels, "layers_per_block": config.blocks_per_level,
        "norm_num_groups": config.norm_groups, "out_channels": config.image_channels,
        "sample_size": sample_size, "scaling_factor": config.scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }  # fmt: skip


def _tiny_decoder_config(config: TinyDecoderConfig) -> dict[str, Any]:
    levels = len(config.blocks)
    return {
        "_class_name": "AutoencoderTiny", "act_fn": "relu", "in_channels": 3, "out_channels": 3,
        "latent_channels": config.latent_channels, "upsampling_scaling_factor": 2, "scaling_factor": 1.0,
        "encoder_block_out_channels": [config.channels] * levels, "num_encoder_blocks": list(config.blocks[::-1]),
        "decoder_block_out_channels": [config.channels] * levels, "num_decoder_blocks": list(config.blocks),
    }  # fmt: skip


def _schedule_config(schedule: NoiseSchedule) -> dict[str, Any]:
    config = {
        "_class_name": "DDIMScheduler", "beta_end": schedule.beta_end, "beta_schedule": schedule.beta_schedule,
        "beta_start": schedule.beta_start, "clip_sample": False, "num_train_timesteps": schedule.train_steps,
        "prediction_type": schedule.prediction, "set_alpha_to_one": schedule.set_alpha_to_one,
        "steps_offset": schedule.steps_offset, "timestep_spacing": schedule.spacing,
        "trained_betas": None if schedule.trained_betas is None else list(schedule.trained_betas),
        "rescale_betas_zero_snr": schedule.zero_snr or None,
    }  # fmt: skip
    # What the model does not say is left out, so that it is not said by the folder either.
    return {key: value for key, value in config.items() if value is not None}


_MODEL_INDEX: Mapping[str, Any] = {
    # Of the form, not of a library that wrote it: without one the reference does not open a pipeline for inpainting.
    "_diffusers_version": "0.30.0",
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
