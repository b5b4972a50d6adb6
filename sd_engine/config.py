"""What a model is made of: frozen configurations, read from the JSON files of a diffusers folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sd_engine.errors import WeightsError


def _refuse(config: Mapping[str, Any], **supported: object) -> None:
    """Raise for a setting that would change the network in a way that is not built here.

    A key that the file leaves out has the reference's default, which is always the supported value.
    """
    for key, wanted in supported.items():
        value = config.get(key, wanted)
        allowed = wanted if isinstance(wanted, tuple) else (wanted,)
        if value not in allowed:
            raise WeightsError(f"model configuration {key}={value!r} is not supported (supported: {wanted!r})")


@dataclass(frozen=True, slots=True)
class ClipConfig:
    """A CLIP text encoder; the defaults are SD 1.x's (OpenAI ViT-L/14)."""

    vocab_size: int = 49408
    width: int = 768
    mlp_width: int = 3072
    layers: int = 12
    heads: int = 12
    max_tokens: int = 77
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ClipConfig:
        """Read `text_encoder/config.json`. Raises WeightsError for an activation that is not known."""
        _refuse(config, hidden_act=("quick_gelu", "gelu"))
        return cls(
            vocab_size=config["vocab_size"],
            width=config["hidden_size"],
            mlp_width=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            max_tokens=config["max_position_embeddings"],
            activation=config.get("hidden_act", "quick_gelu"),
            norm_eps=config.get("layer_norm_eps", 1e-5),
        )


@dataclass(frozen=True, slots=True)
class VaeConfig:
    """A KL autoencoder; the defaults are SD 1.x's."""

    image_channels: int = 3
    latent_channels: int = 4
    channels: tuple[int, ...] = (128, 256, 512, 512)
    blocks_per_level: int = 2
    norm_groups: int = 32
    scaling_factor: float = 0.18215

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along each side."""
        return int(2 ** (len(self.channels) - 1))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> VaeConfig:
        """Read `vae/config.json`. Raises WeightsError for a feature that is not built."""
        _refuse(config, act_fn=("silu", "swish"), mid_block_add_attention=True, use_quant_conv=True, shift_factor=None)
        _refuse(config, use_post_quant_conv=True, latents_mean=None)
        return cls(
            image_channels=config.get("in_channels", 3),
            latent_channels=config.get("latent_channels", 4),
            channels=tuple(config["block_out_channels"]),
            blocks_per_level=config.get("layers_per_block", 1),
            norm_groups=config.get("norm_num_groups", 32),
            scaling_factor=config.get("scaling_factor", 0.18215),
        )


@dataclass(frozen=True, slots=True)
class UNetConfig:
    """A text-conditioned U-Net; the defaults are SD 1.x's. `heads` and `attention` have one entry per level."""

    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention: tuple[bool, ...] = (True, True, True, False)
    heads: tuple[int, ...] = (8, 8, 8, 8)
    blocks_per_level: int = 2
    context_width: int = 768
    norm_groups: int = 32
    linear_projection: bool = False
    sample_size: int = 64

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> UNetConfig:
        """Read `unet/config.json`. Raises WeightsError for a feature that is not built."""
        _refuse(config, act_fn="silu", center_input_sample=False, flip_sin_to_cos=True, freq_shift=0, norm_eps=1e-5)
        _refuse(config, class_embed_type=None, addition_embed_type=None, time_embedding_type="positional")
        _refuse(config, only_cross_attention=False, dual_cross_attention=False, downsample_padding=1)
        _refuse(config, mid_block_type="UNetMidBlock2DCrossAttn", transformer_layers_per_block=1)
        _refuse(config, resnet_time_scale_shift="default", mid_block_scale_factor=1, encoder_hid_dim=None)
        channels = tuple(config["block_out_channels"])
        attention = tuple(_has_attention(name) for name in config["down_block_types"])
        upward = tuple(_has_attention(name) for name in config["up_block_types"])
        if upward[::-1] != attention:
            raise WeightsError(f"up_block_types={config['up_block_types']!r} do not mirror down_block_types")
        # The reference's file calls the number of heads `attention_head_dim` (a name kept for old files).
        heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
        return cls(
            in_channels=config.get("in_channels", 4),
            out_channels=config.get("out_channels", 4),
            channels=channels,
            attention=attention,
            heads=tuple(heads) if isinstance(heads, list | tuple) else (heads,) * len(channels),
            blocks_per_level=config.get("layers_per_block", 2),
            context_width=config["cross_attention_dim"],
            norm_groups=config.get("norm_num_groups", 32),
            linear_projection=config.get("use_linear_projection", False),
            sample_size=config.get("sample_size", 64),
        )


_BLOCK_TYPES = {"CrossAttnDownBlock2D": True, "DownBlock2D": False, "CrossAttnUpBlock2D": True, "UpBlock2D": False}


def _has_attention(block_type: str) -> bool:
    if block_type not in _BLOCK_TYPES:
        raise WeightsError(f"U-Net block type {block_type!r} is not supported (supported: {sorted(_BLOCK_TYPES)})")
    return _BLOCK_TYPES[block_type]
