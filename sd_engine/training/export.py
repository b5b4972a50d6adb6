"""Write a trained model as a diffusers folder, in half precision."""

from __future__ import annotations

from pathlib import Path

import torch

from sd_engine.clip import ClipTextEncoder
from sd_engine.folder_writer import write_folder
from sd_engine.model import Configs
from sd_engine.schedules import NoiseSchedule
from sd_engine.unet import UNet
from sd_engine.vae import Vae


def export(folder: Path, unet: UNet, text_encoder: ClipTextEncoder, vae: Vae, schedule: NoiseSchedule) -> None:
    """Write everything but the tokenizer, whose files are made before the training starts."""
    configs = Configs(text_encoder.config, unet.config, vae.config, schedule)
    write_folder(folder, configs, {"text_encoder": text_encoder, "unet": unet, "vae": vae}, torch.float16)
