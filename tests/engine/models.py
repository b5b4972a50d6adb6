"""What the tests of checkpoints share: tiny models in every layout, and what their parts make of the same inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sd_engine.errors import WeightsError
from sd_engine.model import Configs, Model
from sd_engine.weights import load_model
from tests.engine import ldm_names

UNET, VAE, TEXT = "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"


def configs_of(model: Model) -> Configs:
    return Configs(model.text_encoder.config, model.unet.config, model.vae.config, model.schedule)


@torch.no_grad()
def outputs(model: Model) -> dict[str, list[Tensor]]:
    """What each component makes of the same inputs."""
    generator = torch.Generator().manual_seed(0)
    context = model.text_encoder(model.tokenizer.encode(["a red cat", ""]))
    x = torch.randn((2, model.unet.config.in_channels, 8, 8), generator=generator).to(model.dtype)
    given = torch.randn(context.shape, generator=generator).to(model.dtype)
    decoded = model.vae.decode(x[:, :4])
    return {
        "text_encoder": [context],
        "unet": [model.unet(x, torch.tensor([10.0, 900.0]), given)],
        "vae": [decoded, *model.vae.moments(decoded)],
    }


def differing(a: Model, b: Model) -> list[str]:
    """The components that do not make the same of the same inputs, to the bit: the kernels are the same ones."""
    ours, theirs = outputs(a), outputs(b)
    return [part for part in ours if not all(map(torch.equal, ours[part], theirs[part]))]


def original_tensors(folder: Path, *, openclip: bool = False) -> dict[str, Tensor]:
    """A tiny diffusers folder as an original checkpoint, with what training leaves in one."""
    parts = [load_file(folder / f"{part}.safetensors") for part in (TEXT, UNET, VAE)]
    tensors = ldm_names.checkpoint(*parts, blocks=1, attention=(True, False), levels=4, openclip=openclip)
    rubbish = {"betas": torch.zeros(1000), "alphas_cumprod": torch.zeros(1000), "logvar": torch.zeros(1000)}
    return own(tensors | rubbish)


def own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each with memory of its own, as files want them."""
    return {key: tensor.clone().contiguous() for key, tensor in tensors.items()}


def refusal(path: Path, **choice: Any) -> str:
    """Why a model is not loaded, held to be one sentence that names the file."""
    with pytest.raises(WeightsError) as caught:
        load_model(path, **choice)
    message = str(caught.value)
    assert "\n" not in message and path.name in message, message
    return message
