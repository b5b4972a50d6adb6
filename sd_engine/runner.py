"""Where rows meet tensors: prompts are encoded, noise is drawn, packs are stepped, latents become pictures.

Legend of the shape suffixes: B rows of a pack, U U-Net rows (a guided row has two), S slots of a row's state, I inputs
of a step (the slots and D), C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import reduce
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sd_engine.devices import one_thread, sent
from sd_engine.errors import Cancelled, NonFinite
from sd_engine.guidance import Spread
from sd_engine.halving import halving
from sd_engine.latents import DECODE_BATCH, decode_batches, decode_latents, decode_tiny, rounded
from sd_engine.masks import with_kept
from sd_engine.model import Model
from sd_engine.noise import noise_source
from sd_engine.prompts import DEFAULT_CACHE_BYTES, PromptEncoder, join, tokens
from sd_engine.request import Finished
from sd_engine.reuse import keeping, kept, reused
from sd_engine.row import Lane, Row
from sd_engine.samplers import SLOTS, Col
from sd_engine.start import start

_T = TypeVar("_T")


class Runner:
    """Owns every tensor operation of the engine, and decides nothing: the packer says who is stepped.

    A row that cannot be prepared, stepped or decoded gets its `error` and leaves; its neighbours go on.
    bucket: the U-Net rows that a lane's packs are padded to, 0 for none. cache_bytes: of each model's prompts kept.
    decode_limit: the most pictures that are decoded by one call.
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        bucket: Callable[[Lane], int],
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        decode_limit: int = DECODE_BATCH,
    ) -> None:
        self.models = models
        self.decode_limit = decode_limit
        self.bucket = bucket
        self.prompts = {name: PromptEncoder(model, cache_bytes) for name, model in models.items()}

    @torch.inference_mode()
    def prepare(self, rows: Sequence[Row]) -> None:
        """Give newly admitted rows their contexts, their source of noise and the latent that they start from."""
        for row in rows:
            halving(lambda only: self._prepare(only[0]), [row])

    @torch.inference_mode()
    def denoise(self, rows: Sequence[Row], too_large: Callable[[Sequence[Row]], None]) -> None:
        """Move every row of a pack (one lane) one step of its own, by one U-Net call.

        too_large is told of a pack that memory did not suffice for; its halves are stepped instead.
        """
        padded = rows and self.bucket(rows[0].lane)  # for the sake of bits, which threads would change
        with one_thread() if padded else nullcontext():
            halving(self._denoise, rows, too_large)

    @torch.inference_mode()
    def decode(self, rows: Sequence[Row]) -> list[Finished]:
        """Turn retired rows into what they ended with: a picture, or the reason why there is none."""
        pictures: dict[int, npt.NDArray[np.uint8]] = {}
        complete = (row for row in rows if row.done and not row.cancelled and row.error is None)
        for batch in decode_batches(complete, self.decode_limit):
            halving(lambda part: pictures.update(self._decode(part)), batch)
        return [_finished(row, pictures.get(row.id)) for row in rows]

    def least_unet_rows(self, rows: Sequence[Row]) -> int:
        """The U-Net rows that the call of a pack has at least; those it lacks repeat its last, for nobody."""
        return self.bucket(rows[0].lane)

    def _prepare(self, row: Row) -> None:
        row.contexts = self.prompts[row.lane.model].contexts(row.request)
        # One source of noise per image makes every draw it will ever need: neither its neighbours nor the device can
        # change its noise.
        row.noise = row.noise or noise_source(row.request.noise, row.request.seed)
        begins = start(self.models[row.lane.model], row, row.noise)
        memory = begins.latent_CHW.new_zeros(SLOTS - 1, *begins.latent_CHW.shape)
        row.state = torch.cat([begins.latent_CHW[None], memory])
        row.inpaint, row.condition = begins.inpaint, begins.condition

    def _denoise(self, rows: Sequence[Row]) -> None:
        model = self.models[rows[0].lane.model]
        rows = sorted(rows, key=lambda row: tokens(row.contexts[0]))  # prompts of one length attend together
        state_BSCHW = torch.stack([_there(row.state) for row in rows])
        column, mix_BSI = _tables(rows, model.device)
        spread = Spread.of(rows, model.device, self.least_unet_rows(rows))

        x_BCHW = state_BSCHW[:, 0]
        prediction_UCHW, deep_UCHW = self._predict(model, rows, x_BCHW * _wide(column[Col.c_in]), column[Col.t], spread)
        denoised_BCHW = _wide(column[Col.c_skip]) * x_BCHW + _wide(column[Col.c_out]) * spread.join(prediction_UCHW)
        state_BSCHW = _mixed(mix_BSI, (x_BCHW, denoised_BCHW, *state_BSCHW[:, 1:].unbind(1)))
        keeps = kept(rows, deep_UCHW)  # where the rows stand before they draw
        states = [_noised(row, state_SCHW) for row, state_SCHW in zip(rows, state_BSCHW, strict=True)]
        # From here on nothing can fail for want of memory: the rows change all together, or not at all.
        for row, state_SCHW, keep, denoised_CHW in zip(rows, states, keeps, denoised_BCHW, strict=True):
            row.advance(state_SCHW, keep, denoised_CHW)

    def _predict(
        self, model: Model, rows: Sequence[Row], x_BCHW: Tensor, t_B: Tensor, spread: Spread
    ) -> tuple[Tensor, Tensor | None]:
        """The one U-Net call of a step -> [U, C, H, W], float32, and the deep features that a row is to keep."""
        if rows[0].condition is not None:  # a U-Net for inpainting: every row of its lane has one
            condition_BCHW = torch.stack([_there(row.condition) for row in rows])
            x_BCHW = torch.cat([x_BCHW, condition_BCHW], dim=1)
        contexts = [context for row in rows for context in row.texts]
        contexts += contexts[-1:] * (len(spread.source_U) - len(contexts))
        merging = model.unet.merging(rows[0].call.merging, *x_BCHW.shape[2:])
        context = join(contexts, apart=self.bucket(rows[0].lane) > 0, merging=merging)
        with model.at_work("unet"):
            x_UCHW = x_BCHW[spread.source_U].to(model.dtype)
            t_U, deep_UCHW = t_B[spread.source_U], reused(rows, len(spread.source_U))
            if deep_UCHW is None and not keeping(rows):
                return model.unet(x_UCHW, t_U, context).float(), None
            prediction_UCHW, made_UCHW = model.unet.parted(x_UCHW, t_U, context, deep_UCHW)
            return prediction_UCHW.float(), made_UCHW if deep_UCHW is None else None

    def _decode(self, rows: Sequence[Row]) -> dict[int, npt.NDArray[np.uint8]]:
        latents_BCHW = torch.stack([_there(row.latent) for row in rows])
        decode = decode_tiny if rows[0].request.decoder == "tiny" else decode_latents
        pixels_BCHW = decode(self.models[rows[0].lane.model], latents_BCHW)
        for row, pixels_CHW in zip(rows, pixels_BCHW, strict=True):
            if not bool(pixels_CHW.isfinite().all()):
                row.error = NonFinite(
                    f"the picture is not finite after {row.step} steps: try float32, or less guidance"
                )
        images = rounded(pixels_BCHW).numpy()
        return {row.id: with_kept(row, image) for row, image in zip(rows, images, strict=True) if row.error is None}


def _mixed(mix_BSI: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """The state after the step, [B, S, C, H, W]: mix @ inputs, one of I inputs [B, C, H, W] after the other.

    Elementwise, so that the bits of a row do not depend on how many rows there are, as those of a matrix product may.
    """
    terms = (mix_BSI[:, :, i, None, None, None] * each_BCHW[:, None] for i, each_BCHW in enumerate(inputs))
    return reduce(torch.add, terms)


def _noised(row: Row, state_SCHW: Tensor) -> Tensor:
    """A row's state with the step's noise added, and with what an inpainted row keeps put back."""
    line, x_CHW = row.table.lines[row.step], state_SCHW[0]
    if line[Col.draws]:
        row.drawn = row.drawn if row.drawn is not None else _there(row.noise).draw(tuple(x_CHW.shape))
        x_CHW += sent(row.drawn, x_CHW.device) * float(line[Col.s])
    if row.inpaint is not None:
        kept = row.inpaint
        kept_CHW = kept.latent_CHW * float(line[Col.alpha_after]) + kept.noise_CHW * float(line[Col.sigma_after])
        x_CHW.copy_(kept.mask_1HW * x_CHW + (1 - kept.mask_1HW) * kept_CHW)
    return state_SCHW


def _tables(rows: Sequence[Row], device: torch.device) -> tuple[Tensor, Tensor]:
    """The current lines of the rows' step tables, float32: their columns [columns, B], and their mix [B, S, I]."""
    lines = np.stack([row.table.lines[row.step] for row in rows], axis=1).astype(np.float32)
    mix = np.stack([row.table.mix[row.step] for row in rows]).astype(np.float32)
    return sent(torch.from_numpy(lines), device), sent(torch.from_numpy(mix), device)


def _wide(values_B: Tensor) -> Tensor:
    return values_B[:, None, None, None]


def _finished(row: Row, picture: npt.NDArray[np.uint8] | None) -> Finished:
    made, in_all = row.progress
    error = Cancelled(f"cancelled after {made} of {in_all} steps") if row.cancelled else row.error
    return Finished(row.id, row.request, None if error is not None else picture, error)


def _there(value: _T | None) -> _T:
    assert value is not None, "a row is prepared before it is stepped"
    return value
