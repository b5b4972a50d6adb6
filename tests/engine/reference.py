"""The reference library's modules at SD 1.5's full size, and their weights poured into ours.

They are `Any` to the type checker: diffusers is typed so thinly that its modules seem to be no modules.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from sd_engine.keymaps import KeyMap

Module = TypeVar("Module", bound=nn.Module)


def pour(reference: nn.Module, ours: Module, keymap: KeyMap) -> Module:
    """`ours`, built on `meta`, with the very tensors of the reference."""
    state = {keymap.rename(key) or "": tensor for key, tensor in reference.state_dict().items()}
    ours.load_state_dict(state, strict=True, assign=True)
    return ours.eval()


def sd15_text_encoder() -> Any:
    return CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    )


def sd15_unet() -> Any:
    return UNet2DConditionModel(
        sample_size=64,
        cross_attention_dim=768,
        block_out_channels=(320, 640, 1280, 1280),
        attention_head_dim=8,
        layers_per_block=2,
    )


def sd15_vae() -> Any:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest absolute difference, in standard deviations of `b`."""
    return float((a - b).abs().max() / b.std())
