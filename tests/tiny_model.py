"""A whole Stable Diffusion model of about a megabyte, written by the reference library: a real folder for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SPECIALS = ("<|startoftext|>", "<|endoftext|>")
MERGES = ("r e", "re d</w>", "a t</w>", "c at</w>")
MAX_TOKENS = 77


def vocabulary() -> dict[str, int]:
    """Each byte alone and at the end of a word, a few merged pairs, the specials: any text has its tokens."""
    bytes_ = sorted(ByteLevel.alphabet())
    merged = [pair.replace(" ", "") for pair in MERGES]
    tokens = [*bytes_, *(f"{byte}</w>" for byte in bytes_), *merged, *SPECIALS]
    return {token: i for i, token in enumerate(tokens)}


def write_tokenizer(folder: Path, *, pad: str = SPECIALS[1]) -> None:
    """The four files that an SD 1.x folder has (transformers 4's form, without tokenizer.json); 2.x pads with "!"."""
    start, end = SPECIALS
    specials = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pad}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS, "do_lower_case": True, **specials}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary()), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(specials), "utf-8")


def randomize(module: nn.Module, seed: int) -> None:
    """Disturb every parameter, so that none is at a value (zero, one) that would hide that it is not used."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def make_tiny_model(
    folder: Path,
    *,
    seed: int = 0,
    prediction: str = "epsilon",
    sample_size: int = 8,
    linear_projection: bool = False,
    in_channels: int = 4,
    sd2: bool = False,
    zero_snr: bool = False,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    **saved: Any,
) -> Path:
    """Write a diffusers folder with random weights: pictures of 8 x `sample_size` pixels, factor 8. Returns it.

    in_channels: 9 makes an inpainting U-Net. sd2: what SD 2.x has otherwise: linear projections, more heads where it is
    wider, a text encoder with the exact GELU. saved: how the reference saves it (`max_shard_size`).
    """
    write_tokenizer(folder / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder, vae = _text_encoder("gelu" if sd2 else "quick_gelu"), _vae()
        unet = _unet(sample_size, linear_projection or sd2, in_channels, (2, 4) if sd2 else 2)
    modules: tuple[nn.Module, ...] = (text_encoder, unet, vae)
    for i, module in enumerate(modules):
        randomize(module, seed + i)
        nn.Module.to(module, dtype)
    pipeline: Any = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=unet,
        scheduler=_noise(prediction, zero_snr),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, variant=variant, **saved)
    return folder


def _text_encoder(activation: str) -> Any:
    ids = vocabulary()
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(ids),
            hidden_act=activation,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=ids[SPECIALS[0]],
            eos_token_id=ids[SPECIALS[1]],
            pad_token_id=ids[SPECIALS[1]],
        )
    )


def _unet(sample_size: int, linear_projection: bool, in_channels: int, heads: int | tuple[int, int]) -> Any:
    return UNet2DConditionModel(
        in_channels=in_channels,
        sample_size=sample_size,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=heads,
        norm_num_groups=8,
        use_linear_projection=linear_projection,
    )


def _vae() -> Any:
    channels = (16, 16, 32, 32)
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
    )


def _noise(prediction: str, zero_snr: bool) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
        rescale_betas_zero_snr=zero_snr,
    )
