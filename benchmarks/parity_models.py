"""The full-size models of `benchmarks.parity`: random weights under the original names, and the reference over them."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionInpaintPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from sd_engine import shipped_model
from sd_engine.convert import convert
from tests.engine import ldm_names
from tests.engine.models import own

_UNET = {"sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2}
SD1_UNET = _UNET | {"cross_attention_dim": 768, "attention_head_dim": 8}
_SD2_UNET = _UNET | {
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
    "sample_size": 96,
}
_SD1_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
# 23 of OpenCLIP ViT-H's 24 layers: Stable Diffusion 2 reads the last but one.
_SD2_TEXT = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of checkpoint. overrides: what its file does not say, as `load_model` takes it."""

    name: str
    file: str
    text: Mapping[str, Any]
    unet: Mapping[str, Any]
    modules: tuple[str, ...]
    overrides: Mapping[str, Any] = field(default_factory=dict)
    pipeline: Any = StableDiffusionPipeline


# The VAE is the same network in all of them: it is compared once.
FAMILIES = (
    Family("SD 1.5", "sd15", _SD1_TEXT, SD1_UNET, ("text encoder", "U-Net", "VAE encoder", "VAE decoder", "picture")),
    Family(
        "SD 1.5 inpainting", "sd15-inpainting", _SD1_TEXT, SD1_UNET | {"in_channels": 9}, ("U-Net", "picture"),
        pipeline=StableDiffusionInpaintPipeline,
    ),
    Family(
        "SD 2.1", "sd21", _SD2_TEXT, _SD2_UNET, ("text encoder", "U-Net", "picture"), {"prediction": "v_prediction"}
    ),
)  # fmt: skip


def write_checkpoint(family: Family, path: Path) -> Path:
    """One file, float16, with the original names."""
    torch.manual_seed(0)
    text: Any = CLIPTextModel(CLIPTextConfig(**family.text))
    unet: Any = UNet2DConditionModel(**family.unet)
    vae: Any = AutoencoderKL(**VAE)
    states: list[Mapping[str, Tensor]] = [module.half().state_dict() for module in (text, unet, vae)]
    # Each tensor with memory of its own: OpenCLIP's last layer, which nobody reads, stands in as a copy of another.
    save_file(own(ldm_names.checkpoint(*states)), path)
    return path


def write_model(family: Family, folder: Path, dtype: torch.dtype) -> Path:
    """The same as a diffusers folder in that dtype."""
    checkpoint = write_checkpoint(family, folder.with_name(f"{folder.name}.safetensors"))
    gc.collect()  # the modules that it was made from are as large
    convert(checkpoint, folder, tokenizer=shipped_model() / "tokenizer", dtype=dtype)
    checkpoint.unlink()
    return folder


def open_reference(family: Family, folder: Path) -> Any:
    """The reference's pipeline over the folder that we wrote, at float32, every module loaded strictly."""
    for component, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        _, found = kind.from_pretrained(folder / component, output_loading_info=True)  # type: ignore[no-untyped-call]
        if any(found.values()):
            raise SystemExit(f"{family.name}: the reference does not take our {component} as it is: {found}")
    pipeline = family.pipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
