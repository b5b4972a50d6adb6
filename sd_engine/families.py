"""Which family a checkpoint without configurations belongs to, and how it wants to be drawn with.

The width of the texts that the U-Net attends to tells the family, its input channels tell inpainting. Neither names nor
shapes tell whether an SD 2.x model predicts noise or velocity; what is looked at, in this order:

1. `prediction`, which the caller gives;
2. what the file says: the key `v_pred`, or the entry `modelspec.prediction_type` of a safetensors header;
3. the reference's rule (diffusers `single_file_utils.py`): an SD 2.x checkpoint predicts velocity, at 768 x 768, unless
   it is for inpainting or its `global_step` is 875000, the last of SD 2.0-base: those predict noise, at 512 x 512.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final, get_args

from sd_engine.config import ClipConfig, UNetConfig
from sd_engine.errors import InvalidArgument, WeightsError
from sd_engine.model import SD1, Configs
from sd_engine.namings import Naming
from sd_engine.schedules import NoiseSchedule, Prediction
from sd_engine.tensorfile import TensorFile

# OpenCLIP ViT-H/14 without its last layer; the U-Net's heads are 64 wide at every level.
SD2: Final = Configs(
    text=ClipConfig(width=1024, mlp_width=4096, layers=23, heads=16, activation="gelu"),
    unet=UNetConfig(heads=(5, 10, 20, 20), context_width=1024, linear_projection=True, sample_size=96),
    schedule=NoiseSchedule(prediction="v_prediction", spacing=None),
)
FAMILIES: Final[Mapping[int, tuple[str, Configs]]] = {768: ("SD 1.x", SD1), 1024: ("SD 2.x", SD2)}
PREDICTIONS: Final[tuple[Prediction, ...]] = get_args(Prediction)

_BASE_STEP: Final = 875000
_BASE_SIZE: Final = 64  # latent cells: the 512 pixels of what predicts noise
_SPOKEN: Final[Mapping[object, Prediction]] = {"epsilon": "epsilon", "v": "v_prediction"}
_CROSS_ATTENTION: Final = "attn2.to_k.weight"


def kind(configs: Configs) -> str:
    """The family in words, as `inspect` shows it; by the U-Net's width, so also of models of another size."""
    family, _ = FAMILIES.get(configs.unet.context_width, ("another Stable Diffusion", None))
    return family + (" inpainting" if configs.unet.in_channels > configs.unet.out_channels else "")


def detect(file: TensorFile, unet: Naming, prediction: str | None = None) -> Configs:
    """The configurations of the model that a file's U-Net belongs to. Raises WeightsError for an unknown family."""
    width = next((file.shape(key)[-1] for key in file.keys if key.endswith(_CROSS_ATTENTION)), None)
    if width is None or width not in FAMILIES:
        known = ", ".join(f"{name} takes {width}" for width, (name, _) in FAMILIES.items())
        raise WeightsError(
            f"{file.path}: its U-Net takes texts of width {width}, and {known}; other families are not supported"
        )
    _, family = FAMILIES[width]
    in_channels = file.shape(unet.prefix + unet.probe)[1]
    try:
        found = replace(family, unet=replace(family.unet, in_channels=in_channels))
    except WeightsError as error:
        raise WeightsError(f"{file.path}: {error}") from error
    drawn = trained(found, prediction or _prediction(file, found), "ztsnr" in file.keys)
    size = _BASE_SIZE if drawn.schedule.prediction == "epsilon" else drawn.unet.sample_size
    return replace(drawn, unet=replace(drawn.unet, sample_size=size))


def _prediction(file: TensorFile, family: Configs) -> Prediction:
    if "v_pred" in file.keys:
        return "v_prediction"
    spoken = _SPOKEN.get(file.hints.get("modelspec.prediction_type"))
    if spoken is not None:
        return spoken
    inpainting = family.unet.in_channels > family.unet.out_channels
    base = inpainting or file.hints.get("global_step") == _BASE_STEP
    return "epsilon" if base else family.schedule.prediction


def trained(configs: Configs, prediction: str | None, zero_snr: bool | None) -> Configs:
    """With another prediction, or another end of the noise schedule, than the configurations say; None keeps it.

    Raises InvalidArgument for a prediction that does not exist.
    """
    schedule = configs.schedule
    for known in PREDICTIONS:
        if prediction == known:
            schedule = replace(schedule, prediction=known)
    if prediction is not None and schedule.prediction != prediction:
        raise InvalidArgument("prediction", prediction, ", ".join(PREDICTIONS))
    return replace(configs, schedule=replace(schedule, zero_snr=schedule.zero_snr if zero_snr is None else zero_snr))
