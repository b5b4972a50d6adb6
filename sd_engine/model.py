"""What a model is made of, and a loaded model with its parts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from torch import nn

from sd_engine.clip import ClipTextEncoder
from sd_engine.config import ClipConfig, UNetConfig, VaeConfig
from sd_engine.errors import WeightsError
from sd_engine.offload import Component, Offload, Visitor, check_offload, visitors
from sd_engine.schedules import NoiseSchedule
from sd_engine.tiny_decoder import TinyDecoder
from sd_engine.tokenizer import Tokenizer
from sd_engine.unet import UNet
from sd_engine.vae import Vae

# Of each tensor, for a fingerprint: of a fine-tuned model some thousands are near zero, and turn.
_SIGNS: Final = 256


@dataclass(frozen=True, slots=True)
class Configs:
    """What a model is made of; the defaults are SD 1.x's, because its single-file checkpoints do not say.

    Their schedule names no spacing, as the published folders do not: one model's file and folder draw one picture.
    """

    text: ClipConfig = field(default_factory=ClipConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    schedule: NoiseSchedule = field(default_factory=lambda: NoiseSchedule(spacing=None))

    def __post_init__(self) -> None:
        """Raise WeightsError for parts that do not belong together."""
        if self.unet.context_width != self.text.width:
            raise WeightsError(
                f"the U-Net takes texts of width {self.unet.context_width}, the text encoder gives {self.text.width}"
            )
        latent = self.vae.latent_channels
        # An inpainting U-Net also takes the mask and the latent of the masked picture.
        if self.unet.out_channels != latent or self.unet.in_channels not in (latent, 2 * latent + 1):
            raise WeightsError(
                f"the U-Net takes {self.unet.in_channels} channels and gives {self.unet.out_channels}, the VAE's "
                f"latents have {latent}: supported are models that take {latent}, or {2 * latent + 1} for inpainting, "
                f"and give {latent}"
            )

    @property
    def inpainting(self) -> bool:
        """Whether the U-Net also takes a mask and the latent of the masked picture."""
        return self.unet.in_channels > self.vae.latent_channels


SD1 = Configs()


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """The parts of a loaded model, on one device, in evaluation mode.

    dtype: of activations, and of the weights unless these rest in a narrower one (`devices.working_dtype`).
    offload: which parts wait on the CPU while nobody works with them; raises InvalidDevice for an unknown mode.
    embeddings: vectors [n, text width] by the word of a prompt that stands for them (`prompts.embeddings`).
    tiny_decoder: for requests that choose it; it is small, and stays on the device.
    """

    name: str
    tokenizer: Tokenizer
    text_encoder: ClipTextEncoder
    unet: UNet
    vae: Vae
    schedule: NoiseSchedule
    device: torch.device
    dtype: torch.dtype
    offload: Offload = "resident"
    embeddings: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)
    tiny_decoder: TinyDecoder | None = None
    _visitors: Mapping[Component, Visitor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_offload(self.offload)
        object.__setattr__(self, "_visitors", visitors(self.modules, self.device, self.offload))

    @property
    def modules(self) -> dict[Component, nn.Module]:
        """The components that have weights."""
        return {"text_encoder": self.text_encoder, "unet": self.unet, "vae": self.vae}

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, in pixels, that the model was trained at."""
        side = self.unet.config.sample_size * self.factor
        return side, side

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along each side."""
        return self.vae.config.factor

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return self.vae.config.latent_channels

    @property
    def inpainting(self) -> bool:
        """Whether the U-Net also takes a mask and the latent of the masked picture."""
        return self.unet.config.in_channels > self.latent_channels

    @property
    def fingerprint(self) -> str:
        """The same for models that draw the same, up to rounding: of the configurations and of weights' signs.

        The signs outlive a change of dtype and are few to read; another training turns some of them. Read anew at each
        call.
        """
        digest = hashlib.sha256(repr((self.text_encoder.config, self.unet.config, self.vae.config)).encode())
        digest.update(repr(self.schedule).encode())
        for component, module in self.modules.items():
            for name, weight in module.state_dict().items():
                digest.update(f"{component}.{name}".encode())
                signs = weight.detach().flatten()[:_SIGNS].signbit()
                digest.update(signs.cpu().numpy().tobytes())
        return digest.hexdigest()

    def at_work(self, component: Component) -> AbstractContextManager[None]:
        """Inside, this component's weights are on the model's device; may be nested.

        A U-Net whose layers stream in one by one is the exception: each is there while it is called.
        """
        visitor = self._visitors.get(component)
        return nullcontext() if visitor is None else visitor.visit()


def shipped_model() -> Path:
    """The folder of the model that comes with the package."""
    return Path(__file__).parent / "models" / "nightshift-mini"
