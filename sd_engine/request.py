"""What the engine accepts (a request: one image to draw) and how it answers."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from sd_engine.errors import InvalidRequest
from sd_engine.samplers import SAMPLERS

CELL: Final = 8  # sizes are multiples of this: pixels per latent cell of Stable Diffusion's autoencoder, along a side
MIN_SIDE: Final = 64
MAX_SIDE: Final = 4096
MAX_STEPS: Final = 1000
MAX_GUIDANCE: Final = 100.0
MAX_SEED: Final = 2**64 - 1
MAX_DEEPCACHE_INTERVAL: Final = 20
MAX_TOKEN_MERGING_RATIO: Final = 0.75  # all but one of each square of 2 x 2 positions
MAX_CLIP_SKIP: Final = 12
MAX_MASK_BLUR: Final = 256.0
MAX_UPSCALE: Final = 4.0

Resize = Literal["stretch", "crop", "fill"]
Upscaling = Literal["latent", "pixel"]
Noise = Literal["cpu", "cuda"]
Decoder = Literal["vae", "tiny"]


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One image to draw. Raises InvalidRequest, naming the field, its value and the allowed range.

    guidance: classifier-free guidance scale; None or at most 1 means unguided, one U-Net row instead of two.
    guidance_rescale: 0 to 1, how far guided predictions are brought back to the deviation of those with the prompt.
    guidance_start, guidance_stop: shares of a pass's steps; those before and after are unguided, one U-Net row instead
    of two, and the picture is another one (Kynkaanniemi et al. 2024, arXiv 2404.07724).
    deepcache_interval: each so many steps the whole U-Net is computed, and between only its last block, on deep
    features of the last whole step; 1 computes all of it always (Ma et al. 2023, arXiv 2312.00858).
    token_merging_ratio: the share of the positions that do not attend for themselves where there are most of them
    (Bolya and Hoffman 2023, arXiv 2303.17604); it pays from about 768 x 768 pixels on.
    decoder: what makes the picture of the last latent: the VAE, or the model's tiny decoder, if it has one.
    eta: 0 (deterministic) to 1 (as noisy as DDPM), for the sampler `ddim` only.
    clip_skip: which layer of the text encoder is taken, counted from the last: 1 is the last, 2 the one before.
    width, height: pixels, multiples of 8; None takes the init image's size (rounded down to 8) or the model's own.
    init_image: uint8 [H, W, 3] or [H, W, 4] (transparent parts become white), copied.
    strength: how much of an init image is drawn anew, (0, 1]; at least one step is always made.
    mask: uint8 [H, W] of the init image's size: from 128 on drawn anew, else kept; copied. Strength 1 then starts from
    noise alone. mask_blur: deviation in pixels of the picture drawn; a blurred mask blends softly (with an inpainting
    U-Net it stays hard, as the reference's).
    resize: how an init image (and its mask) of another shape comes to width x height: stretched, cut off at the longer
    sides, or whole with its edges continued.
    upscale: a second pass at this many times the size; upscale_strength and upscale_steps (None: `steps`) are that
    pass's own, upscale_by says whether the latent or the picture is enlarged. A mask stays in force: what it keeps
    comes from the init image again, at the larger size.
    noise: whose random numbers: torch's on a CPU, or those that CUDA devices draw (both computed on the CPU). Of a
    seed, torch's CPU generator reads the low 32 bits only.
    model: a name among the engine's models; None is its first.
    """

    prompt: str
    _: KW_ONLY
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 20
    guidance: float | None = 7.5
    guidance_rescale: float = 0.0
    guidance_start: float = 0.0
    guidance_stop: float = 1.0
    deepcache_interval: int = 1
    token_merging_ratio: float = 0.0
    decoder: Decoder = "vae"
    sampler: str = "dpmpp_2m_karras"
    eta: float = 0.0
    clip_skip: int = 1
    width: int | None = None
    height: int | None = None
    init_image: npt.NDArray[np.uint8] | None = None
    strength: float = 0.75
    mask: npt.NDArray[np.uint8] | None = None
    mask_blur: float = 0.0
    resize: Resize = "stretch"
    upscale: float | None = None
    upscale_strength: float = 0.5
    upscale_steps: int | None = None
    upscale_by: Upscaling = "latent"
    noise: Noise = "cpu"
    model: str | None = None

    def __post_init__(self) -> None:
        _text("prompt", self.prompt)
        _text("negative_prompt", self.negative_prompt)
        _whole("seed", self.seed, 0, MAX_SEED)
        _whole("steps", self.steps, 1, MAX_STEPS)
        if self.guidance is not None:
            _number("guidance", self.guidance, 0.0, MAX_GUIDANCE, f"a number from 0 to {MAX_GUIDANCE:g}, or None")
        _number("guidance_rescale", self.guidance_rescale, 0.0, 1.0, "a number from 0 to 1")
        self._check_interval()
        _whole("deepcache_interval", self.deepcache_interval, 1, MAX_DEEPCACHE_INTERVAL)
        most = MAX_TOKEN_MERGING_RATIO
        _number("token_merging_ratio", self.token_merging_ratio, 0.0, most, f"a number from 0 to {most:g}")
        _choice("decoder", self.decoder, get_args(Decoder))
        _choice("sampler", self.sampler, SAMPLERS)
        _number("eta", self.eta, 0.0, 1.0, "a number from 0 to 1")
        _whole("clip_skip", self.clip_skip, 1, MAX_CLIP_SKIP)
        _number("strength", self.strength, math.ulp(0.0), 1.0, "a number above 0, at most 1")
        _choice("resize", self.resize, get_args(Resize))
        _choice("noise", self.noise, get_args(Noise))
        if self.model is not None:
            _text("model", self.model)
        _side("width", self.width)
        _side("height", self.height)
        self._check_upscale()
        self._check_pictures()

    def _check_interval(self) -> None:
        _number("guidance_start", self.guidance_start, 0.0, math.nextafter(1.0, 0.0), "a number from 0, below 1")
        _number("guidance_stop", self.guidance_stop, math.ulp(0.0), 1.0, "a number above 0, at most 1")
        if not self.guidance_start < self.guidance_stop:
            allowed = f"above guidance_start, {self.guidance_start:g}"
            raise InvalidRequest("guidance_stop", self.guidance_stop, allowed, "guidance=None is unguided throughout")

    def _check_upscale(self) -> None:
        if self.upscale is not None:
            allowed = f"a number above 1, at most {MAX_UPSCALE:g}, or None"
            _number("upscale", self.upscale, math.nextafter(1.0, 2.0), MAX_UPSCALE, allowed)
        _number("upscale_strength", self.upscale_strength, math.ulp(0.0), 1.0, "a number above 0, at most 1")
        if self.upscale_steps is not None:
            _whole("upscale_steps", self.upscale_steps, 1, MAX_STEPS)
        _choice("upscale_by", self.upscale_by, get_args(Upscaling))

    def _check_pictures(self) -> None:
        _number("mask_blur", self.mask_blur, 0.0, MAX_MASK_BLUR, f"a number from 0 to {MAX_MASK_BLUR:g} pixels")
        if self.mask is not None:
            if self.init_image is None:
                raise InvalidRequest("mask", "given without init_image", "a mask of an init_image", "give both")
            object.__setattr__(self, "mask", _pixels("mask", self.mask, 2, "uint8 [H, W]"))
        if self.init_image is not None:
            picture = _pixels("init_image", self.init_image, 3, "uint8 [H, W, 3] or [H, W, 4]")
            object.__setattr__(self, "init_image", picture)
            self.size(MIN_SIDE, MIN_SIDE)
            if self.mask is not None and self.mask.shape != picture.shape[:2]:
                allowed = f"the init_image's height and width, {picture.shape[:2]}"
                raise InvalidRequest("mask.size", self.mask.shape, allowed, "draw the mask on that picture")

    @property
    def guided(self) -> bool:
        """Whether any step may be."""
        return self.guidance is not None and self.guidance > 1

    def guided_steps(self, steps: int) -> range:
        """Which of so many steps are guided; bounds are rounded down, as the reference's guiders do."""
        if not self.guided:
            return range(0)
        return range(int(self.guidance_start * steps), int(self.guidance_stop * steps))

    def size(self, model_height: int, model_width: int) -> tuple[int, int]:
        """(height, width) in pixels: as asked, else the init image's rounded down to 8, else the model's own.

        Raises InvalidRequest for an init image whose own size cannot be drawn.
        """
        if self.init_image is not None:
            model_height, model_width = (side - side % CELL for side in self.init_image.shape[:2])
        height = self.height if self.height is not None else model_height
        width = self.width if self.width is not None else model_width
        if not all(MIN_SIDE <= side <= MAX_SIDE for side in (height, width)):
            allowed = f"sides of {MIN_SIDE} to {MAX_SIDE} pixels, where width and height are not given"
            raise InvalidRequest("init_image.size", (height, width), allowed, "give width and height")
        return height, width

    def larger(self, height: int, width: int) -> tuple[int, int]:
        """The second pass's (height, width) after a first of this size: `upscale` times, rounded to multiples of 8.

        Raises InvalidRequest above MAX_SIDE.
        """
        times = self.upscale if self.upscale is not None else 1.0
        height, width = (CELL * int(side * times / CELL + 0.5) for side in (height, width))
        if max(height, width) > MAX_SIDE:
            allowed = f"sides of at most {MAX_SIDE} pixels, not {height} x {width}"
            raise InvalidRequest("upscale", self.upscale, allowed, "enlarge less, or begin smaller")
        return height, width


@dataclass(frozen=True, slots=True, eq=False)
class Finished:
    """How a request ended; exactly one for each added. image: uint8 [H, W, 3], None exactly when there is an error."""

    id: int
    request: Request
    image: npt.NDArray[np.uint8] | None
    error: Exception | None = None


def _text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise InvalidRequest(name, value, "a string")


def _whole(name: str, value: object, low: int, high: int) -> None:
    # A bool is an int to Python; steps=True is a mistake, not one step.
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidRequest(name, value, f"a whole number from {low} to {high}")


def _number(name: str, value: object, low: float, high: float, allowed: str) -> None:
    # A comparison with NaN is false, so this refuses NaN and both infinities too.
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidRequest(name, value, allowed)


def _side(name: str, value: int | None) -> None:
    if value is None:
        return
    allowed = f"a multiple of {CELL} from {MIN_SIDE} to {MAX_SIDE} pixels, or None"
    if not isinstance(value, int) or isinstance(value, bool) or value % CELL or not MIN_SIDE <= value <= MAX_SIDE:
        raise InvalidRequest(name, value, allowed)


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InvalidRequest(name, value, "one of " + ", ".join(allowed))


def _pixels(name: str, value: object, dimensions: int, form: str) -> npt.NDArray[np.uint8]:
    """A read-only copy: the caller may draw on its own array before the row is prepared."""
    if not isinstance(value, np.ndarray):
        raise InvalidRequest(name, type(value).__name__, f"a numpy array {form}", "np.asarray(image)")
    fits = value.ndim == dimensions and (dimensions == 2 or value.shape[2] in (3, 4))
    if value.dtype != np.uint8 or not fits or 0 in value.shape:
        found = f"{value.dtype} {list(value.shape)}"
        raise InvalidRequest(name, found, form, "convert it, with values from 0 to 255")
    copy = value.copy()
    copy.setflags(write=False)
    return copy
