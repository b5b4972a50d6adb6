"""Two passes: drawn small, enlarged, drawn on; each pass is the reference's, and its rows are rows like any others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from sd_engine import Cancelled, Engine, Finished, InvalidRequest, Model, NonFinite, Request, load_model
from sd_engine.engine import RunnerLike
from sd_engine.masks import mask_of
from sd_engine.passes import first_row, second_row
from sd_engine.pictures import fit_mask
from sd_engine.row import Lane, Row
from tests.tiny_model import make_tiny_model

# The reference's own schedulers turn a torch tensor into an array in a way that numpy 2 warns about.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

Pixels = npt.NDArray[np.uint8]

# Ours is rounded to 256 levels (0.5 / 255); the rest is float32 in another order over a few steps. Enlarged as a
# picture, the first pass is rounded too, and a value next to a half may round the other way.
TOLERANCE = {"latent": 1 / 255, "pixel": 2 / 255}

SEED, SIDE, LARGER = 5, 64, 96
INIT = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
MASK = np.zeros((SIDE, SIDE), np.uint8)
MASK[:, 32:] = 255

SCHEDULERS: dict[str, type[Any]] = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,  # draws at every step: the draws of the second pass go on where the first's end
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
}


@dataclass(frozen=True, slots=True)
class Reference:
    """The same weights in the reference's pipelines."""

    parts: dict[str, Any]

    def pipeline(self, kind: type[Any], sampler: str) -> Any:
        scheduler = SCHEDULERS[sampler].from_config(self.parts["scheduler"].config)
        pipeline = kind(**{**self.parts, "scheduler": scheduler}, requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def latent(self, picture: npt.NDArray[np.generic], generator: torch.Generator) -> torch.Tensor:
        vae = self.parts["vae"]
        with torch.inference_mode():
            moments = vae.encode(torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1).latent_dist
            latent: torch.Tensor = moments.sample(generator) * vae.config.scaling_factor
        return latent

    def picture(self, latent: torch.Tensor) -> npt.NDArray[np.float32]:
        vae = self.parts["vae"]
        with torch.inference_mode():
            decoded = vae.decode(latent / vae.config.scaling_factor).sample[0]
        array: npt.NDArray[np.float32] = (decoded / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
        return array


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Model, Reference]]:
    """By the U-Net's channels: 4 is an ordinary one, 9 one for inpainting."""

    def pair(channels: int) -> tuple[Model, Reference]:
        folder = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", in_channels=channels)
        parts = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True).components
        return load_model(folder), Reference(parts)

    return {channels: pair(channels) for channels in (4, 9)}


@pytest.fixture(scope="module")
def model(models: dict[int, tuple[Model, Reference]]) -> Model:
    return models[4][0]


@pytest.fixture(scope="module")
def reference(models: dict[int, tuple[Model, Reference]]) -> Reference:
    return models[4][1]


def request(**fields: Any) -> Request:
    settings: dict[str, Any] = {"seed": SEED, "steps": 4, "guidance": 3.0, "width": SIDE, "height": SIDE}
    wanted = {"sampler": "ddim", "upscale": 1.5, "upscale_strength": 0.5, "upscale_steps": 6, "strength": 0.75}
    return Request("red cat", **{**settings, **wanted, **fields})


def common(generator: torch.Generator) -> dict[str, Any]:
    return {"prompt": "red cat", "guidance_scale": 3.0, "generator": generator}


def enlarged(latent: torch.Tensor) -> torch.Tensor:
    return F.interpolate(latent, (LARGER // 8, LARGER // 8), mode="bilinear")


def difference(ours: Pixels, theirs: npt.NDArray[np.float32]) -> float:
    return float(np.abs(ours / 255 - theirs).max())


@pytest.mark.parametrize("by", ["latent", "pixel"])
@pytest.mark.parametrize("init_image", [None, INIT], ids=["txt2img", "img2img"])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_both_passes_are_the_references(
    model: Model, reference: Reference, sampler: str, init_image: Pixels | None, by: str
) -> None:
    generator = torch.Generator("cpu").manual_seed(SEED)
    first: dict[str, Any] = {**common(generator), "num_inference_steps": 4}
    first["output_type"] = "latent" if by == "latent" else "pil"
    over = reference.pipeline(diffusers.StableDiffusionImg2ImgPipeline, sampler)
    if init_image is None:
        text = reference.pipeline(diffusers.StableDiffusionPipeline, sampler)
        image = text(**first, height=SIDE, width=SIDE).images
    else:
        image = over(**first, image=Image.fromarray(init_image), strength=0.75).images
    image = enlarged(image) if by == "latent" else image[0].resize((LARGER, LARGER), Image.Resampling.LANCZOS)
    theirs = over(**common(generator), image=image, strength=0.5, num_inference_steps=6, output_type="np").images[0]

    ours = Engine(model).render([request(sampler=sampler, init_image=init_image, upscale_by=by)])[0]
    assert ours.shape == (LARGER, LARGER, 3)
    assert difference(ours, theirs) <= TOLERANCE[by]


def test_what_is_kept_comes_from_the_init_image_at_the_larger_size(model: Model, reference: Reference) -> None:
    """With an ordinary U-Net: a mask of nothing gives the init image back, as the VAE sees it at the larger size."""
    detailed = np.random.default_rng(7).integers(0, 256, (LARGER, LARGER, 3), dtype=np.uint8)
    mask = np.zeros((LARGER, LARGER), np.uint8)
    generator = torch.Generator("cpu").manual_seed(SEED)
    for side in (SIDE, SIDE, SIDE, LARGER):  # sample, noise, the sample that is not used; noise of the second pass
        torch.randn((4, side // 8, side // 8), generator=generator)
    theirs = reference.picture(reference.latent(detailed, generator))
    ours = Engine(model).render([request(init_image=detailed, mask=mask)])[0]
    assert difference(ours, theirs) <= TOLERANCE["latent"]


def _draw(runner: RunnerLike, row: Row) -> None:
    runner.prepare([row])
    while not row.done:
        runner.denoise([row], lambda rows: None)


def test_the_mask_stays_in_force_at_the_larger_size(model: Model) -> None:
    """Seen in the latent: the VAE's attention lets every pixel of a decoded picture depend on every cell."""
    runner = Engine(model).runner
    first = first_row(1, request(init_image=INIT, mask=MASK), model.name, model)
    _draw(runner, first)
    last = second_row(first)
    assert last is not None
    _draw(runner, last)
    assert last.latent is not None and last.inpaint is not None
    changed = (last.latent != last.inpaint.latent_CHW).any(0)
    assert changed.shape == (LARGER // 8, LARGER // 8)
    assert not changed[:, :6].any() and changed[:, 6:].all()


def test_the_blur_of_a_mask_grows_with_the_picture(model: Model) -> None:
    runner = Engine(model).runner
    first = first_row(1, request(init_image=INIT, mask=MASK, mask_blur=4.0), model.name, model)
    _draw(runner, first)
    last = second_row(first)
    assert last is not None
    runner.prepare([last])
    assert np.array_equal(mask_of(last), fit_mask(MASK, LARGER, LARGER, blur=4.0 * LARGER / SIDE))


@pytest.mark.parametrize("strength", [0.75, 1.0])
def test_a_nine_channel_second_pass_is_the_references_inpainting(
    models: dict[int, tuple[Model, Reference]], strength: float
) -> None:
    """At strength 1 the first pass starts from noise alone; the second never does."""
    model, reference = models[9]
    inpaint = reference.pipeline(diffusers.StableDiffusionInpaintPipeline, "ddim")
    generator = torch.Generator("cpu").manual_seed(SEED)
    first = inpaint(
        **common(generator), image=Image.fromarray(INIT), mask_image=Image.fromarray(MASK), height=SIDE, width=SIDE,
        strength=strength, num_inference_steps=4, output_type="latent",
    ).images  # fmt: skip
    size = (LARGER, LARGER)
    larger, mask = (np.asarray(Image.fromarray(p).resize(size, Image.Resampling.LANCZOS)) for p in (INIT, MASK))
    grey = np.where(mask[..., None] >= 128, 127.5, larger).astype(np.float32)
    ahead = torch.Generator("cpu")  # the noise is drawn first, then the sample of the masked picture
    ahead.set_state(generator.get_state())
    torch.randn((1, 4, LARGER // 8, LARGER // 8), generator=ahead)
    theirs = inpaint(
        **common(generator), image=enlarged(first), mask_image=Image.fromarray(mask), height=LARGER, width=LARGER,
        masked_image_latents=reference.latent(grey, ahead), strength=0.5, num_inference_steps=6, output_type="np",
    ).images[0]  # fmt: skip
    ours = Engine(model).render([request(init_image=INIT, mask=MASK, strength=strength)])[0]
    assert difference(ours, theirs) <= TOLERANCE["latent"]


def test_progress_knows_both_passes_from_the_start(model: Model) -> None:
    engine = Engine(model)
    id = engine.add(request())
    seen = [engine.progress(id)]
    while not (finished := engine.step()):
        seen.append(engine.progress(id))
        engine.packer.check()
    assert seen == [(made, 4 + 3) for made in range(7)]  # int(6 * 0.5) steps of the second pass
    assert finished[0].id == id and finished[0].image is not None
    assert engine.idle


def test_rows_of_a_second_pass_share_packs_with_others_and_no_picture_changes(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [
        request(),
        request(seed=6, upscale=None, width=LARGER, height=LARGER, steps=14, sampler="euler_a"),
        request(seed=7, upscale_by="pixel", guidance=None, sampler="ddpm"),
        request(seed=8, init_image=INIT, mask=MASK, mask_blur=2.0, sampler="dpmpp_2m"),
        request(seed=9, upscale=None),
    ]
    alone = [Engine(model).render([wanted])[0] for wanted in requests]
    engine = Engine(model)
    packs: list[set[int]] = []
    pack = engine.packer.pack

    def seen() -> list[Row]:
        rows = pack()
        if rows and rows[0].lane == Lane(model.name, LARGER, LARGER):
            packs.append({row.id for row in rows})
        return rows

    monkeypatch.setattr(engine.packer, "pack", seen)
    together = engine.render(requests)
    assert {1, 2, 3, 4} in packs
    # Kernels add in another order for another batch size: a value next to a half may round the other way, and in the
    # row that is enlarged as a picture that level is drawn on.
    for got, wanted in zip(together, alone, strict=True):
        assert np.abs(got.astype(int) - wanted.astype(int)).max() <= 2


@pytest.mark.parametrize("steps_before", [2, 5])
def test_a_request_is_cancelled_in_either_pass(model: Model, steps_before: int) -> None:
    engine = Engine(model)
    id = engine.add(request())
    for _ in range(steps_before):
        assert engine.step() == []
    engine.cancel(id)
    (finished,) = engine.step()
    assert isinstance(finished.error, Cancelled)
    assert str(finished.error) == f"cancelled after {steps_before} of 7 steps"
    assert engine.idle


@pytest.mark.parametrize("by", ["latent", "pixel"])
def test_a_first_pass_that_is_not_finite_fails_alone(model: Model, by: str) -> None:
    engine = Engine(model)
    bad, good = engine.add(request(upscale_by=by)), engine.add(request(upscale_by=by))
    rows = engine.packer.admit()
    engine.runner.prepare(rows)
    assert rows[0].state is not None
    rows[0].state = rows[0].state * float("nan")
    endings: dict[int, Finished] = {}
    while not engine.idle:
        endings |= {finished.id: finished for finished in engine.step()}
    assert isinstance(endings[bad].error, NonFinite)
    assert endings[good].error is None


@pytest.mark.parametrize(
    ("size", "times", "wanted"), [((64, 72), 1.5, (96, 112)), ((512, 768), 2, (1024, 1536)), ((64, 64), 1.01, (64, 64))]
)
def test_the_larger_size_is_rounded_to_whole_cells(
    size: tuple[int, int], times: float, wanted: tuple[int, int]
) -> None:
    assert request(upscale=times).larger(*size) == wanted


def test_a_picture_that_would_become_too_large_is_refused_when_it_is_added(model: Model) -> None:
    engine = Engine(model)
    with pytest.raises(InvalidRequest, match=r"upscale=4.0 .* at most 4096 pixels, not 4128 x 256; enlarge less"):
        engine.add(request(upscale=4.0, height=1032))
    assert engine.idle


def test_a_second_pass_that_the_schedule_cannot_lay_out_is_refused_when_it_is_added(model: Model) -> None:
    engine = Engine(model)
    with pytest.raises(InvalidRequest, match="steps=1000"):
        engine.add(request(sampler="ddim", upscale_steps=1000))
    assert engine.idle
