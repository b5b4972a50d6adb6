"""What the engine accepts (a request: one image to draw) and what it keeps while drawing it (a row)."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from sd_engine.errors import InvalidRequest
from sd_engine.samplers import SAMPLERS, StepTable

if TYPE_CHECKING:
    import torch

CELL: Final = 8  # sizes are multiples of this: pixels per latent cell of Stable Diffusion's autoencoder, along a side
MIN_SIDE: Final = 64
MAX_SIDE: Final = 4096
MAX_STEPS: Final = 1000
MAX_GUIDANCE: Final = 100.0
MAX_SEED: Final = 2**64 - 1


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One image to draw. Raises InvalidRequest, naming the field, its value and the allowed range.

    guidance: classifier-free guidance scale; None or at most 1 means unguided, one U-Net row instead of two.
    width, height: pixels, multiples of 8; None takes the init image's size (rounded down to 8) or the model's own.
    init_image: uint8 [H, W, 3], copied; resized when width and height say otherwise.
    strength: how much of an init image is drawn anew, (0, 1]; at least one step is always made.
    model: a name among the engine's models; None is its first.
    """

    prompt: str
    _: KW_ONLY
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 20
    guidance: float | None = 7.5
    sampler: str = "dpmpp_2m_karras"
    width: int | None = None
    height: int | None = None
    init_image: npt.NDArray[np.uint8] | None = None
    strength: float = 0.75
    model: str | None = None

    def __post_init__(self) -> None:
        _text("prompt", self.prompt)
        _text("negative_prompt", self.negative_prompt)
        _whole("seed", self.seed, 0, MAX_SEED)
        _whole("steps", self.steps, 1, MAX_STEPS)
        if self.guidance is not None:
            _number("guidance", self.guidance, 0.0, MAX_GUIDANCE, f"a number from 0 to {MAX_GUIDANCE:g}, or None")
        _number("strength", self.strength, math.ulp(0.0), 1.0, "a number above 0, at most 1")
        if self.sampler not in SAMPLERS:
            raise InvalidRequest("sampler", self.sampler, "one of " + ", ".join(SAMPLERS))
        if self.model is not None:
            _text("model", self.model)
        _side("width", self.width)
        _side("height", self.height)
        if self.init_image is not None:
            object.__setattr__(self, "init_image", _picture(self.init_image))
            self.size(MIN_SIDE, MIN_SIDE)

    @property
    def guided(self) -> bool:
        return self.guidance is not None and self.guidance > 1

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


class Lane(NamedTuple):
    """Rows that may share a pack: the same model and size (pixels)."""

    model: str
    height: int
    width: int


@dataclass(frozen=True, slots=True, eq=False)
class Finished:
    """How a request ended; exactly one for each added. image: uint8 [H, W, 3], None exactly when there is an error."""

    id: int
    request: Request
    image: npt.NDArray[np.uint8] | None
    error: Exception | None = None


@dataclass(slots=True, eq=False)
class Row:
    """One image in flight: the only mutable state of the engine, changed only by a step that succeeded.

    The runner fills the second half. latent, denoised_before: float [4, h, w], x and the D before of the step table.
    context: the encoded prompts. generator: the image's own CPU generator, seeded by the request, for every draw.
    """

    id: int
    request: Request
    lane: Lane
    table: StepTable
    step: int = 0
    cancelled: bool = False
    error: Exception | None = None
    latent: torch.Tensor | None = field(default=None, repr=False)
    denoised_before: torch.Tensor | None = field(default=None, repr=False)
    context: torch.Tensor | None = field(default=None, repr=False)
    generator: torch.Generator | None = field(default=None, repr=False)

    @property
    def guided(self) -> bool:
        return self.request.guided

    @property
    def unet_rows(self) -> int:
        """Rows of the U-Net's batch: with and without prompt when guided."""
        return 2 if self.guided else 1

    @property
    def units(self) -> int:
        """What a step of this row costs: U-Net rows times latent area."""
        return self.unet_rows * (self.lane.height // CELL) * (self.lane.width // CELL)

    @property
    def done(self) -> bool:
        return self.step >= len(self.table)

    @property
    def leaving(self) -> bool:
        """Nothing more to step: done, cancelled or failed."""
        return self.done or self.cancelled or self.error is not None


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


def _picture(value: object) -> npt.NDArray[np.uint8]:
    """A read-only copy: the caller may draw on its own array before the row is prepared."""
    if not isinstance(value, np.ndarray):
        raise InvalidRequest("init_image", type(value).__name__, "a numpy array uint8 [H, W, 3]", "np.asarray(image)")
    if value.dtype != np.uint8 or value.ndim != 3 or value.shape[2] != 3 or 0 in value.shape:
        found = f"{value.dtype} {list(value.shape)}"
        raise InvalidRequest("init_image", found, "uint8 [H, W, 3]", "convert to RGB with values from 0 to 255")
    copy = value.copy()
    copy.setflags(write=False)
    return copy
