"""What the engine keeps while it draws a request: a row, in its lane."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from sd_engine.request import CELL, Request
from sd_engine.samplers import StepTable

if TYPE_CHECKING:
    import torch

    from sd_engine.noise import NoiseSource
    from sd_engine.prompts import Context


class Lane(NamedTuple):
    """Rows that may share a pack: the same model and size (pixels)."""

    model: str
    height: int
    width: int

    @property
    def cells(self) -> int:
        """Latent cells of one picture."""
        return (self.height // CELL) * (self.width // CELL)


@dataclass(frozen=True, slots=True, eq=False)
class Inpaint:
    """What an inpainted row keeps as it is: everything where the mask is 0.

    mask_1HW: float32 in [0, 1], 1 is drawn anew. latent_CHW: the clean picture. noise_CHW: what it is noised with.
    """

    mask_1HW: torch.Tensor
    latent_CHW: torch.Tensor
    noise_CHW: torch.Tensor


class Call(NamedTuple):
    """What the rows of one U-Net call have in common beside their lane, at this step.

    shallow: the deep features of an earlier step are reused (`reuse`). merging: the ratio of merged tokens (`merging`).
    """

    shallow: bool = False
    merging: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Saved:
    """Where a row stood between two steps (`saved`).

    state: float32 [n, C, h, w], the slots that its table still reads (`StepTable.live`), on the CPU; in a row that is
    in flight, all slots, on its device. None before a second pass that has not begun. noise: the state of its source.
    The others are those of `Row`.
    """

    step: int
    noise: torch.Tensor
    state: torch.Tensor | None = None
    drawn: torch.Tensor | None = None
    first_pass: torch.Tensor | None = None
    began: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What a row keeps of its last whole step for the shallow ones that follow (`reuse`).

    at: where it stood before that step; one that is saved meanwhile goes back there. unet_rows: of that step.
    features: [unet_rows, C, h, w], in the model's dtype.
    """

    at: Saved
    unet_rows: int
    features: torch.Tensor


@dataclass(slots=True, eq=False)
class Row:
    """One image in flight: the only mutable state of the engine, changed only by a step that succeeded.

    The runner fills the second half. state: float32 [SLOTS, C, h, w], x and the memory of the step table (`samplers`).
    contexts: the encoded prompts, one for each U-Net row of a guided step, the prompt itself last. noise: the image's
    own source of every draw it ever makes; drawn: what it drew for a step that has not succeeded yet.
    condition: float32 [5, h, w], the further channels of an inpainting U-Net.
    second: the row that goes on when this one is done (`passes`), with the steps made before it, and, as soon as they
    are made, first_pass: the latent that it starts from, and began: the state of the source of noise at that moment.
    denoised: float32 [C, h, w], what the last step expected in the end (`preview`).
    resume: where the row goes on as soon as it is prepared. kept: only while the step that comes is a shallow one.
    urgent: somebody waits for this picture; it goes before the others (`packer`).
    """

    id: int
    request: Request
    lane: Lane
    table: StepTable
    step: int = 0
    cancelled: bool = False
    error: Exception | None = None
    state: torch.Tensor | None = field(default=None, repr=False)
    contexts: tuple[Context, ...] = field(default=(), repr=False)
    noise: NoiseSource | None = field(default=None, repr=False)
    drawn: torch.Tensor | None = field(default=None, repr=False)
    inpaint: Inpaint | None = field(default=None, repr=False)
    condition: torch.Tensor | None = field(default=None, repr=False)
    second: Row | None = field(default=None, repr=False)
    steps_before: int = 0
    first_pass: torch.Tensor | None = field(default=None, repr=False)
    began: torch.Tensor | None = field(default=None, repr=False)
    resume: Saved | None = field(default=None, repr=False)
    kept: Kept | None = field(default=None, repr=False)
    denoised: torch.Tensor | None = field(default=None, repr=False)
    urgent: bool = False

    @property
    def latent(self) -> torch.Tensor | None:
        """x, the latent itself: float32 [C, h, w]."""
        return None if self.state is None else self.state[0]

    @property
    def guided(self) -> bool:
        """Whether the step that comes is."""
        return self.step in self.request.guided_steps(len(self.table))

    @property
    def unet_rows(self) -> int:
        """Rows of the U-Net's batch in the step that comes: without and with prompt when guided."""
        return 2 if self.guided else 1

    @property
    def units(self) -> int:
        """What the step that comes costs: U-Net rows times latent area."""
        return self.unet_rows * self.lane.cells

    @property
    def most_units(self) -> int:
        """What the dearest of its steps to come costs."""
        guided = self.request.guided_steps(len(self.table))
        return (2 if max(self.step, guided.start) < guided.stop else 1) * self.lane.cells

    @property
    def call(self) -> Call:
        """What it must have in common with the rows that it shares the U-Net call of the step that comes with."""
        return Call(self.kept is not None and self._reuses(self.kept), self.request.token_merging_ratio)

    def _reuses(self, kept: Kept) -> bool:
        # Where guidance begins, nothing was kept for the U-Net row without the prompt.
        within = self.step < kept.at.step + self.request.deepcache_interval
        return within and not self.done and self.unet_rows <= kept.unet_rows

    def advance(self, state: torch.Tensor, kept: Kept | None = None, denoised: torch.Tensor | None = None) -> None:
        """Take over what a step has made. This cannot fail: the rows of a pack advance all together or not at all."""
        self.state, self.drawn, self.kept, self.denoised = state, None, kept, denoised
        self.step += 1
        if not self.call.shallow:
            self.kept = None

    def standing(self) -> Saved | None:
        """Where it stands; None before it is prepared."""
        if self.noise is None or (self.state is None and self.first_pass is None):
            return None
        return Saved(self.step, self.noise.state(), self.state, self.drawn, self.first_pass, self.began)

    @property
    def texts(self) -> tuple[Context, ...]:
        """What its U-Net rows of the step that comes attend to: the prompt comes last."""
        return self.contexts[-self.unet_rows :]

    @property
    def progress(self) -> tuple[int, int]:
        """Steps made and steps in all, of both passes."""
        later = 0 if self.second is None else len(self.second.table)
        return self.steps_before + self.step, self.steps_before + len(self.table) + later

    @property
    def done(self) -> bool:
        return self.step >= len(self.table)

    @property
    def leaving(self) -> bool:
        """Nothing more to step: done, cancelled or failed."""
        return self.done or self.cancelled or self.error is not None
