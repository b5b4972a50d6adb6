"""Inpainting, with ordinary and with nine-channel U-Nets, against the reference's own pipeline."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, get_args

import diffusers
import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from sd_engine import Engine, Model, Request, load_model
from sd_engine.noise import noise_source
from sd_engine.passes import first_row
from sd_engine.pictures import fit, fit_mask
from sd_engine.request import Resize
from sd_engine.start import Start, start
from tests.tiny_model import make_tiny_model

# The reference's own schedulers turn a torch tensor into an array in two ways that numpy 2 warns about.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]

Pixels = npt.NDArray[np.uint8]

# Ours is rounded to 256 levels (0.5 / 255); the rest is float32 in another order over a few steps.
TOLERANCE = 1 / 255

STEPS, SEED, GUIDANCE, SIDE = 6, 5, 3.0, 64

INIT = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
MASK = np.zeros((SIDE, SIDE), np.uint8)
MASK[10:40, 20:60] = 255
ALL, NOTHING = np.full_like(MASK, 255), np.zeros_like(MASK)


_ReferenceDpm2: Any = diffusers.KDPM2DiscreteScheduler  # typed so thinly that it seems to have no methods


class KeepingDpm2(_ReferenceDpm2):  # type: ignore[misc]
    """What is kept gets the noise level that x has; after a half step the reference gives it the whole step's."""

    def add_noise(self, original: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> Any:
        """As the base class's, after half a step too."""
        if self.step_index is None or self.state_in_first_order:
            return super().add_noise(original, noise, timesteps)
        return original + noise * self.sigmas_interpol[self.step_index]


SCHEDULERS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "ddim": (diffusers.DDIMScheduler, {}),
    "ddpm": (diffusers.DDPMScheduler, {}),  # draws at every step: the count of the draws before matters
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "dpmpp_2m_karras": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
}
# Two lines a step, deeper memory, other ways of adding noise: what these do with a mask is seen at one strength.
MORE: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    "lcm": (diffusers.LCMScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "dpm2": (KeepingDpm2, {}),
    "dpm2_a": (diffusers.KDPM2AncestralDiscreteScheduler, {}),
    "dpmpp_2m_sde": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
}
# The reference's class takes wrong weights where it does not start at the beginning: strength 1 it is.
LMS: dict[str, tuple[type[Any], dict[str, Any]]] = {"lms": (diffusers.LMSDiscreteScheduler, {})}


@dataclass(frozen=True, slots=True)
class Pair:
    """Ours and the reference's, with the same weights."""

    model: Model
    pipeline: Any
    schedule: Any

    def ours(self, sampler: str, **fields: Any) -> Pixels:
        return Engine(self.model).render([request(sampler=sampler, **fields)])[0]

    def theirs(self, sampler: str, init: Pixels, mask: Pixels | Image.Image, **settings: Any) -> Any:
        kind, options = (SCHEDULERS | MORE | LMS)[sampler]
        self.pipeline.scheduler = kind.from_config(self.schedule, **options)
        wanted = {
            "prompt": "red cat",
            "image": Image.fromarray(init),
            "mask_image": Image.fromarray(mask) if isinstance(mask, np.ndarray) else mask,
            "height": SIDE,
            "width": SIDE,
            "strength": 0.7,
            "num_inference_steps": STEPS,
            "guidance_scale": GUIDANCE,
            "generator": torch.Generator("cpu").manual_seed(SEED),
            "output_type": "np",
        }
        return self.pipeline(**{**wanted, **settings}).images[0]


def request(**fields: Any) -> Request:
    settings: dict[str, Any] = {"seed": SEED, "steps": STEPS, "guidance": GUIDANCE, "width": SIDE, "height": SIDE}
    return Request("red cat", **{**settings, "strength": 0.7, **fields})


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Pair]:
    """By the U-Net's channels: 4 is an ordinary one, 9 one for inpainting."""

    def pair(channels: int) -> Pair:
        folder = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", in_channels=channels)
        parts = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True).components
        pipeline: Any = diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)
        return Pair(load_model(folder), pipeline, pipeline.scheduler.config)

    return {channels: pair(channels) for channels in (4, 9)}


def difference(ours: Pixels, theirs: npt.NDArray[np.float32]) -> float:
    return float(np.abs(ours / 255 - theirs).max())


def begins(model: Model, wanted: Request) -> Start:
    row = first_row(1, wanted, model.name, model)
    with torch.inference_mode():
        return start(model, row, noise_source("cpu", wanted.seed))


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize(
    ("sampler", "strength"),
    [
        *itertools.product(SCHEDULERS, (0.34, 0.7, 1.0)),
        *itertools.product(MORE, (0.7,)),
        *itertools.product(LMS, (1.0,)),
    ],
)
def test_an_inpainted_picture_is_the_references(
    pairs: dict[int, Pair], sampler: str, strength: float, channels: int
) -> None:
    ours = pairs[channels].ours(sampler, init_image=INIT, mask=MASK, strength=strength)
    theirs = pairs[channels].theirs(sampler, INIT, MASK, strength=strength)
    assert difference(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("channels", [4, 9])
def test_a_picture_of_another_size_and_a_grey_mask_are_the_references_too(
    pairs: dict[int, Pair], channels: int
) -> None:
    random = np.random.default_rng(2)
    init, mask = random.integers(0, 256, (91, 75, 3), dtype=np.uint8), random.integers(0, 256, (91, 75), dtype=np.uint8)
    ours = pairs[channels].ours("euler_a", init_image=init, mask=mask, guidance=None)
    assert difference(ours, pairs[channels].theirs("euler_a", init, mask, guidance_scale=1.0)) <= TOLERANCE


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("resize", get_args(Resize))
def test_picture_and_mask_come_to_the_size_in_the_way_that_the_request_says(
    pairs: dict[int, Pair], resize: Resize, channels: int
) -> None:
    init = np.random.default_rng(2).integers(0, 256, (91, 75, 3), dtype=np.uint8)
    mask = np.zeros((91, 75), np.uint8)
    mask[:30, :20] = 255
    asked = begins(pairs[channels].model, request(init_image=init, mask=mask, resize=resize))
    fitted = fit(init, SIDE, SIDE, resize), fit_mask(mask, SIDE, SIDE, resize)
    wanted = begins(pairs[channels].model, request(init_image=fitted[0], mask=fitted[1]))
    assert torch.equal(asked.latent_CHW, wanted.latent_CHW)
    for ours, theirs in zip(_kept(asked), _kept(wanted), strict=True):
        assert torch.equal(ours, theirs)


def _kept(start: Start) -> list[torch.Tensor]:
    if start.inpaint is not None:
        return [start.inpaint.mask_1HW, start.inpaint.latent_CHW]
    assert start.condition is not None
    return [start.condition]


def test_without_a_mask_a_nine_channel_model_draws_all_anew(pairs: dict[int, Pair]) -> None:
    text_only = pairs[9].ours("euler_a")
    over_a_picture = pairs[9].ours("euler_a", init_image=INIT, strength=0.5)
    assert difference(text_only, pairs[9].theirs("euler_a", INIT, ALL, strength=1.0)) <= TOLERANCE
    assert difference(over_a_picture, pairs[9].theirs("euler_a", INIT, ALL, strength=0.5)) <= TOLERANCE


@pytest.mark.parametrize("channels", [4, 9])
def test_a_blurred_mask_is_hard_in_the_steps_as_the_references_and_soft_over_the_picture(
    pairs: dict[int, Pair], channels: int
) -> None:
    pair = pairs[channels]
    blurred = pair.pipeline.mask_processor.blur(Image.fromarray(MASK), blur_factor=6)
    soft = np.asarray(blurred, dtype=np.float64)[..., None] / 255
    theirs = soft * pair.theirs("ddim", INIT, blurred) + (1 - soft) * (INIT / 255)
    ours = pair.ours("ddim", init_image=INIT, mask=MASK, mask_blur=6.0)
    assert difference(ours, theirs) <= TOLERANCE
    far = np.asarray(blurred) == 0
    assert far.any() and np.array_equal(ours[far], INIT[far]), "beyond the blur the init image is kept to the bit"


def test_a_blurred_masks_edge_stays_where_it_is_however_many_steps_there_are(pairs: dict[int, Pair]) -> None:
    few, many = (
        begins(pairs[4].model, request(init_image=INIT, mask=MASK, mask_blur=6.0, steps=steps)).inpaint
        for steps in (4, 40)
    )
    assert few is not None and many is not None
    assert set(many.mask_1HW.unique().tolist()) == {0.0, 1.0} and torch.equal(few.mask_1HW, many.mask_1HW)


def test_a_mask_of_nothing_gives_back_the_picture_as_the_vae_sees_it(pairs: dict[int, Pair]) -> None:
    ours = pairs[4].ours("euler_a", init_image=INIT, mask=NOTHING)
    vae = pairs[4].pipeline.vae
    with torch.inference_mode():
        pixels = torch.from_numpy(INIT).permute(2, 0, 1)[None] / 127.5 - 1
        latent = vae.encode(pixels).latent_dist.sample(torch.Generator("cpu").manual_seed(SEED))
        theirs = (vae.decode(latent).sample[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
    assert difference(ours, theirs) <= TOLERANCE


def test_a_mask_of_all_is_as_none(pairs: dict[int, Pair]) -> None:
    """For a sampler that draws nothing later: the sample of the masked picture, which is not used, moves the draws."""
    masked, plain = (pairs[4].ours("ddim", init_image=INIT, mask=mask) for mask in (ALL, None))
    assert np.array_equal(masked, plain)


def test_rows_with_and_without_masks_share_one_pack(pairs: dict[int, Pair]) -> None:
    requests = [
        request(sampler="euler_a", init_image=INIT, mask=MASK),
        request(sampler="ddim", seed=8),
        request(sampler="dpmpp_2m_karras", seed=9, init_image=INIT, mask=MASK, mask_blur=3.0, guidance=None),
        request(sampler="ddpm", seed=10, init_image=INIT),
    ]
    for pair in pairs.values():
        engine = Engine(pair.model)
        together = engine.render(requests)
        alone = [engine.render([wanted])[0] for wanted in requests]
        # Kernels add in another order for another batch size: a value next to a half may round the other way.
        assert max(np.abs(a.astype(int) - b.astype(int)).max() for a, b in zip(together, alone, strict=True)) <= 1
