"""What a model is made of: frozen configurations, read from the JSON files of a diffusers folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, isfinite
from typing import Any, Final

from sd_engine.errors import WeightsError

_WIDEST: Final = 2**20  # of anything that is counted in a model: far above any, far below what fills a memory
_LISTS: Final = (  # one number for each level
    *("block_out_channels", "decoder_block_out_channels"),
    *("attention_head_dim", "num_attention_heads"),
)
_MOST_LEVELS: Final = 10
_DEEPEST: Final = 200  # layers one after the other: building more takes minutes before a file is looked at


def _refuse(config: Mapping[str, Any], **supported: object) -> None:
    """Raise for a setting that would change the network in a way that is not built here.

    A key that the file leaves out has the reference's default, which is always the supported value.
    """
    for key, wanted in supported.items():
        allowed = wanted if isinstance(wanted, tuple) else (wanted,)
        if key in config and config[key] not in allowed:
            raise WeightsError(f"model configuration {key}={config[key]!r} is not supported (supported: {wanted!r})")


def _check_whole(config: Mapping[str, Any], *keys: str, most: int = _WIDEST) -> None:
    """Raise for a setting that is there and no whole number from 1 to `most`; a few may be lists of them."""
    for key in keys:
        value = config.get(key, 1)
        numbers = value if key in _LISTS and isinstance(value, list | tuple) and value else [value]
        if not all(type(number) is int and 1 <= number <= most for number in numbers):
            raise WeightsError(f"model configuration {key}={value!r} is not allowed: whole numbers from 1 to {most}")


def _check_number(config: Mapping[str, Any], key: str) -> None:
    """Raise for a setting that is there and no number above 0."""
    value = config.get(key, 1)
    if not isinstance(value, int | float) or not (isfinite(value) and value > 0):
        raise WeightsError(f"model configuration {key}={value!r} is not allowed: a number above 0")


def _check_parts(width: int, parts: int, what: str) -> None:
    """Raise for a layer whose channels cannot be cut into so many equal parts."""
    if width % parts:
        raise WeightsError(f"model configuration: a layer of {width} channels cannot have {parts} equal {what}")


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
        _check_whole(config, "vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings")
        _check_whole(config, "num_attention_heads")
        _check_whole(config, "num_hidden_layers", most=_DEEPEST)
        _check_number(config, "layer_norm_eps")
        _check_parts(config["hidden_size"], config["num_attention_heads"], "heads")
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
        _check_whole(config, "in_channels", "latent_channels", "block_out_channels", "norm_num_groups")
        _check_whole(config, "layers_per_block", most=_DEEPEST)
        _check_number(config, "scaling_factor")
        for width in config["block_out_channels"]:
            _check_parts(width, config.get("norm_num_groups", 32), "groups")
        return cls(
            image_channels=config.get("in_channels", 3),
            latent_channels=config.get("latent_channels", 4),
            channels=tuple(config["block_out_channels"]),
            blocks_per_level=config.get("layers_per_block", 1),
            norm_groups=config.get("norm_num_groups", 32),
            scaling_factor=config.get("scaling_factor", 0.18215),
        )


@dataclass(frozen=True, slots=True)
class TinyDecoderConfig:
    """A TAESD's decoder; the defaults are the published one's. `blocks` has one entry per level, the coarsest first."""

    latent_channels: int = 4
    channels: int = 64
    blocks: tuple[int, ...] = (3, 3, 3, 1)

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along each side."""
        return int(2 ** (len(self.blocks) - 1))

    @property
    def reach(self) -> int:
        """Latent cells around one that its pixels depend on, rounded up: each convolution sees one of its level's."""
        of_level = (3 * blocks + 2 for blocks in self.blocks)  # with those before and after the blocks
        return ceil(sum(convs / 2**level for level, convs in enumerate(of_level))) + 1

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> TinyDecoderConfig:
        """Read the `config.json` of an AutoencoderTiny. Raises WeightsError for a feature that is not built."""
        _refuse(config, _class_name="AutoencoderTiny", act_fn="relu", out_channels=3, upsampling_scaling_factor=2)
        _refuse(config, upsample_fn="nearest", scaling_factor=1.0, shift_factor=0.0)
        _check_whole(config, "latent_channels", "decoder_block_out_channels")
        published = cls()
        widths = config.get("decoder_block_out_channels", (published.channels,))
        blocks = config.get("num_decoder_blocks", published.blocks)
        fitting = isinstance(blocks, list | tuple) and all(type(n) is int and 0 < n <= _DEEPEST for n in blocks)
        uniform = isinstance(widths, list | tuple) and len(set(widths)) == 1
        if not fitting or not uniform or not 1 <= len(blocks) <= _MOST_LEVELS:
            raise WeightsError(
                f"model configuration decoder_block_out_channels={widths!r}, num_decoder_blocks={blocks!r} is not "
                f"supported: one width at all levels, 1 to {_MOST_LEVELS} levels of 1 to {_DEEPEST} blocks"
            )
        return cls(config.get("latent_channels", published.latent_channels), widths[0], tuple(blocks))


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
        _refuse(
            config, resnet_out_scale_factor=1, resnet_skip_time_act=False, mid_block_only_cross_attention=(None, False)
        )
        _refuse(config, time_embedding_act_fn=None, timestep_post_act=None)
        _check_whole(config, "in_channels", "out_channels", "block_out_channels", "cross_attention_dim")
        _check_whole(config, "norm_num_groups")
        if config.get("sample_size") is not None:  # the reference's own default, written out, is null
            _check_whole(config, "sample_size")
        _check_whole(config, "layers_per_block", most=_DEEPEST)
        channels = tuple(config["block_out_channels"])
        attention = tuple(_has_attention(name) for name in config["down_block_types"])
        upward = tuple(_has_attention(name) for name in config["up_block_types"])
        if upward[::-1] != attention:
            raise WeightsError(f"up_block_types={config['up_block_types']!r} do not mirror down_block_types")
        # The reference's file calls the number of heads `attention_head_dim` (a name kept for old files).
        named = "num_attention_heads" if config.get("num_attention_heads") else "attention_head_dim"
        _check_whole(config, named)
        heads = config.get(named, 8)
        heads = tuple(heads) if isinstance(heads, list | tuple) else (heads,) * len(channels)
        if not len(channels) == len(attention) == len(heads):
            raise WeightsError(
                f"block_out_channels={channels}, down_block_types and {named} do not have the same length"
            )
        for width, parts in zip(channels, heads, strict=True):
            _check_parts(width, parts, "heads")
            _check_parts(width, config.get("norm_num_groups", 32), "groups")
        return cls(
            in_channels=config.get("in_channels", 4),
            out_channels=config.get("out_channels", 4),
            channels=channels,
            attention=attention,
            heads=heads,
            blocks_per_level=config.get("layers_per_block", 2),
            context_width=config["cross_attention_dim"],
            norm_groups=config.get("norm_num_groups", 32),
            linear_projection=config.get("use_linear_projection", False),
            sample_size=config.get("sample_size") or 64,
        )


_BLOCK_TYPES = {"CrossAttnDownBlock2D": True, "DownBlock2D": False, "CrossAttnUpBlock2D": True, "UpBlock2D": False}


def _has_attention(block_type: str) -> bool:
    if block_type not in _BLOCK_TYPES:
        raise WeightsError(f"U-Net block type {block_type!r} is not supported (supported: {sorted(_BLOCK_TYPES)})")
    return _BLOCK_TYPES[block_type]
