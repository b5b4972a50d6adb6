"""The U-Nets that `benchmarks.unet` times: ours and the reference's, over the very same weights.

Legend of the shape suffixes: U U-Net rows, C channels, H height, W width, T text tokens, D width of a token.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from sd_engine import winograd
from sd_engine.config import UNetConfig
from sd_engine.devices import working_dtype
from sd_engine.keymaps import DIFFUSERS_UNET
from sd_engine.layers import lay_out_weights
from sd_engine.unet import UNet
from tests.engine.prepacked import a_cpu_that_does_not_prepack
from tests.engine.reference import pour

FULL: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": 8,
    "layers_per_block": 2,
}
QUICK: dict[str, Any] = FULL | {"cross_attention_dim": 64, "block_out_channels": (32, 64, 64, 64), "sample_size": 16}

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What every U-Net is given."""

    x_UCHW: Tensor
    t_U: Tensor
    text_UTD: Tensor

    @classmethod
    def of(cls, rows: int, side: int, width: int, dtype: torch.dtype) -> Inputs:
        """Noise, timesteps that differ, and texts, for so many rows of side x side latent cells."""
        generator = torch.Generator().manual_seed(rows)
        x_UCHW = torch.randn(rows, 4, side, side, generator=generator).to(dtype)
        text_UTD = torch.randn(rows, 77, width, generator=generator).to(dtype)
        return cls(x_UCHW, torch.linspace(10, 980, rows), text_UTD)


class Peers:
    """Makes each peer by name; all share one set of random weights."""

    names = ("ours", "ours, plain convolutions", "ours compiled", "eager", "channels-last", "compiled", "openvino")

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype) -> None:
        self._config, self._dtype = config, dtype
        self.reference = _reference(config, dtype)
        self.ours = _ours(config, self.reference)
        self._works_in = working_dtype(dtype, torch.device("cpu"))
        lay_out_weights(self.ours, self._works_in)

    def make(self, name: str, inputs: Inputs) -> Forward | None:
        """The peer, compiled for these inputs where it is compiled; None where what it needs is not installed."""
        reference, ours = self.reference, self.ours
        if name == "ours":
            return self._given(ours)
        if name == "ours, plain convolutions":
            return self._given(_plainly(ours))
        if name == "ours compiled":
            return self._given(_compiled(ours))
        if name == "eager":
            return _eager(reference)
        if name == "channels-last":
            return _eager(_channels_last(reference))
        if name == "compiled":
            compiled = _compiled(_channels_last(reference))
            return lambda x, t, text: compiled(x, t, text, return_dict=False)[0]
        return self._openvino(inputs)

    def _given(self, forward: Forward) -> Forward:
        """What the runner gives our U-Net: activations in the dtype that it works in."""
        return lambda x, t, text: forward(x.to(self._works_in), t, text.to(self._works_in))

    def _openvino(self, inputs: Inputs) -> Forward | None:
        if importlib.util.find_spec("openvino") is None:
            return None
        with tempfile.TemporaryDirectory() as folder:  # what is compiled holds what it needs of the file open
            return _openvino(self.reference, inputs, Path(folder))


def _reference(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        reference: Any = UNet2DConditionModel(**config)
    reference = reference.to_empty(device="cpu").to(dtype).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in reference.named_parameters():
        # Weights of a deviation that keeps activations about one, norms that only normalise.
        if parameter.dim() > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return reference


def _ours(config: Mapping[str, Any], reference: Any) -> UNet:
    channels = config["block_out_channels"]
    attention = (*(True,) * (len(channels) - 1), False)
    with torch.device("meta"):
        ours = UNet(
            UNetConfig(
                channels=channels,
                context_width=config["cross_attention_dim"],
                heads=(config["attention_head_dim"],) * len(channels),
                attention=attention,
                blocks_per_level=config["layers_per_block"],
                sample_size=config["sample_size"],
            )
        )
    return pour(reference, ours, DIFFUSERS_UNET).requires_grad_(False)


def _plainly(ours: UNet) -> Forward:
    """Ours without Winograd's algorithm, without prepacked weights and what goes by these (attention by products)."""

    def forward(x_UCHW: Tensor, t_U: Tensor, text_UTD: Tensor) -> Tensor:
        # Without prepacked weights too: they stand in the place of Winograd's filters.
        with mock.patch.object(winograd, "form_for", return_value=None), a_cpu_that_does_not_prepack():
            prediction_UCHW: Tensor = ours(x_UCHW, t_U, text_UTD)
        return prediction_UCHW

    return forward


def _eager(reference: Any) -> Forward:
    def forward(x_UCHW: Tensor, t_U: Tensor, text_UTD: Tensor) -> Tensor:
        prediction_UCHW: Tensor = reference(x_UCHW, t_U, text_UTD).sample
        return prediction_UCHW

    return forward


def _channels_last(reference: Any) -> Any:
    """The reference with its weights and activations in that layout; what has no layout is shared with the other."""
    shared = {id(weight): weight for weight in reference.parameters() if weight.dim() != 4}
    return copy.deepcopy(reference, shared).to(memory_format=torch.channels_last)


def _compiled(module: nn.Module) -> Any:
    """By inductor, for static shapes; its weights prepacked ("freezing")."""
    inductor = importlib.import_module("torch._inductor.config")
    inductor.freezing = True  # type: ignore[attr-defined]
    return torch.compile(module, dynamic=False)


def _openvino(reference: Any, inputs: Inputs, folder: Path) -> Forward:
    """For these shapes alone, in the precision of the weights; from a file, so that its weights are not held twice."""
    openvino = importlib.import_module("openvino")
    # In a process of its own: what traces and converts keeps copies of the weights until it ends.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        path = pool.submit(_converted, dict(reference.config), inputs, folder).result()
    precision = "f32" if inputs.x_UCHW.dtype == torch.float32 else "bf16"
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(path, "CPU", options)

    def forward(x_UCHW: Tensor, t_U: Tensor, text_UTD: Tensor) -> Tensor:
        given = _given_to_openvino(reference, x_UCHW, t_U, text_UTD)
        return torch.from_numpy(compiled([each.numpy() for each in given])[0]).to(x_UCHW.dtype)

    return forward


def _given_to_openvino(reference: Any, x_UCHW: Tensor, t_U: Tensor, text_UTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Sinusoids of the timesteps: OpenVINO would round their angles to bfloat16, by up to 2 at 980.
    return x_UCHW.float(), reference.time_proj(t_U), text_UTD.float()


@torch.inference_mode()
def _converted(config: Mapping[str, Any], inputs: Inputs, folder: Path) -> Path:
    """The file of the reference with the same weights, which are made anew, for these shapes."""
    openvino = importlib.import_module("openvino")
    dtype = inputs.x_UCHW.dtype
    reference = _reference({name: config[name] for name in FULL}, dtype).float()  # it is rounded when it is compiled

    class Plain(nn.Module):
        def forward(self, x_UCHW: Tensor, sinusoids_UE: Tensor, text_UTD: Tensor) -> Tensor:
            with mock.patch.object(reference, "get_time_embed", return_value=sinusoids_UE):
                prediction_UCHW: Tensor = reference(x_UCHW, 0, text_UTD, return_dict=False)[0]
            return prediction_UCHW

    example = _given_to_openvino(reference, inputs.x_UCHW, inputs.t_U, inputs.text_UTD)
    model = openvino.convert_model(Plain(), example_input=example, input=[list(each.shape) for each in example])
    openvino.save_model(model, folder / "unet.xml", compress_to_fp16=dtype != torch.float32)
    return folder / "unet.xml"
