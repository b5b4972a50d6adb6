"""Where rows meet tensors: prompts are encoded, noise is drawn, packs are stepped, latents become pictures.

Legend of the shape suffixes: B rows of a pack, U U-Net rows (a guided row has two), C channels, H height, W width,
T text tokens, D width of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from sd_engine.errors import Cancelled, NonFinite
from sd_engine.prompts import PromptCache
from sd_engine.request import Finished, Row
from sd_engine.samplers import Col
from sd_engine.weights import Model

# Pictures decoded by one call: the VAE's full-size feature maps take far more memory than the U-Net's.
DECODE_BATCH = 4

_T = TypeVar("_T")


class Runner:
    """Owns every tensor operation of the engine, and decides nothing: the packer says who is stepped.

    A row that cannot be prepared, stepped or decoded gets its `error` and leaves; its neighbours go on.
    """

    def __init__(self, models: Mapping[str, Model]) -> None:
        self.models = models
        self.prompts = {name: PromptCache(model) for name, model in models.items()}

    @torch.inference_mode()
    def prepare(self, rows: Sequence[Row]) -> None:
        """Give newly admitted rows their context, their generator and the latent that they start from."""
        for row in rows:
            try:
                self._prepare(row)
            except Exception as error:
                row.error = error

    @torch.inference_mode()
    def denoise(self, rows: Sequence[Row]) -> None:
        """Move every row of a pack (one lane) one step of its own, by one U-Net call."""
        _halving(self._denoise, rows)

    @torch.inference_mode()
    def decode(self, rows: Sequence[Row]) -> list[Finished]:
        """Turn retired rows into what they ended with: a picture, or the reason why there is none."""
        pictures: dict[int, npt.NDArray[np.uint8]] = {}
        for batch in _decode_batches(row for row in rows if row.done and not row.cancelled and row.error is None):
            _halving(lambda part: pictures.update(self._decode(part)), batch)
        return [_finished(row, pictures.get(row.id)) for row in rows]

    def _prepare(self, row: Row) -> None:
        model, request, table = self.models[row.lane.model], row.request, row.table
        prompts = [request.negative_prompt, request.prompt] if row.guided else [request.prompt]
        row.context = torch.stack([self.prompts[row.lane.model].encode(prompt) for prompt in prompts])
        # One CPU generator per image makes every draw it will ever need: neither its neighbours nor the device can
        # change its noise. The order of the draws is the reference's: sample of the init image, noise, then steps.
        row.generator = torch.Generator("cpu").manual_seed(request.seed)
        shape = (
            model.latent_channels,
            row.lane.height // model.factor,
            row.lane.width // model.factor,
        )
        if request.init_image is None:
            start_CHW = _draw(row, shape, model.device) * table.init_noise_scale
        else:
            image_BCHW = _as_pixels(request.init_image, row.lane.height, row.lane.width).to(model.device, model.dtype)
            sample_BCHW = _draw(row, shape, model.device).to(model.dtype)[None]
            latent_CHW = model.vae.encode(image_BCHW, sample_BCHW)[0].float()
            start_CHW = latent_CHW * table.init_image_scale + _draw(row, shape, model.device) * table.add_noise_scale
        row.latent, row.denoised_before = start_CHW, torch.zeros_like(start_CHW)

    def _denoise(self, rows: Sequence[Row]) -> None:
        model = self.models[rows[0].lane.model]
        x_BCHW = torch.stack([_there(row.latent) for row in rows])
        before_BCHW = torch.stack([_there(row.denoised_before) for row in rows])
        column = _columns(rows, model.device)
        source_U, first_B, last_B, guidance_B = _guidance_index(rows, model.device)

        prediction_UCHW = model.unet(
            (x_BCHW * _wide(column[Col.c_in]))[source_U].to(model.dtype),
            column[Col.t][source_U],
            torch.cat([_there(row.context) for row in rows]),
        ).float()
        # An unguided row is its own first and last U-Net row, so its guidance multiplies zero.
        first_BCHW, last_BCHW = prediction_UCHW[first_B], prediction_UCHW[last_B]
        prediction_BCHW = first_BCHW + _wide(guidance_B) * (last_BCHW - first_BCHW)

        denoised_BCHW = _wide(column[Col.c_skip]) * x_BCHW + _wide(column[Col.c_out]) * prediction_BCHW
        x_BCHW = _wide(column[Col.a]) * x_BCHW + _wide(column[Col.b]) * denoised_BCHW
        x_BCHW = x_BCHW + _wide(column[Col.c]) * before_BCHW
        # From here on nothing can fail for want of memory: the rows change all together, or not at all.
        for row, x_CHW, denoised_CHW in zip(rows, x_BCHW, denoised_BCHW, strict=True):
            line = row.table.lines[row.step]
            noise_CHW = _draw(row, tuple(x_CHW.shape), model.device) * float(line[Col.s]) if line[Col.draws] else 0.0
            row.latent, row.denoised_before = x_CHW + noise_CHW, denoised_CHW
            row.step += 1

    def _decode(self, rows: Sequence[Row]) -> dict[int, npt.NDArray[np.uint8]]:
        model = self.models[rows[0].lane.model]
        latents_BCHW = torch.stack([_there(row.latent) for row in rows]).to(model.dtype)
        pixels_BCHW = model.vae.decode(latents_BCHW).float().cpu()
        for row, pixels_CHW in zip(rows, pixels_BCHW, strict=True):
            if not bool(pixels_CHW.isfinite().all()):
                row.error = NonFinite(
                    f"the picture is not finite after {row.step} steps: try float32, or less guidance"
                )
        images = (pixels_BCHW / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).mul(255).round().nan_to_num().to(torch.uint8)
        return {row.id: image.numpy() for row, image in zip(rows, images, strict=True) if row.error is None}


def _halving(work: Callable[[Sequence[Row]], None], rows: Sequence[Row]) -> None:
    """Do the work for all rows at once; if that fails, for each half: out of memory shrinks, a bad row fails alone."""
    if not rows:
        return
    try:
        work(rows)
    except Exception as error:
        if len(rows) == 1:
            rows[0].error = error
            return
        middle = len(rows) // 2
        _halving(work, rows[:middle])
        _halving(work, rows[middle:])


def _draw(row: Row, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The image's next standard normal noise, float32, drawn on the CPU and then moved."""
    return torch.randn(shape, generator=_there(row.generator), dtype=torch.float32).to(device)


def _columns(rows: Sequence[Row], device: torch.device) -> Tensor:
    """The step tables' current lines, turned: [columns, B], float32."""
    lines = np.stack([row.table.lines[row.step] for row in rows], axis=1).astype(np.float32)
    return torch.from_numpy(lines).to(device)


def _guidance_index(rows: Sequence[Row], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How B rows spread over U U-Net rows: U -> row; row -> its first and its last U-Net row, and its guidance.

    rows      guided   unguided   guided
    U         0  1     2          3  4       (without the prompt first, then with it)
    source    0  0     1          2  2
    first     0        2          3
    last         1     2             4
    """
    counts = [row.unet_rows for row in rows]
    source = [b for b, n in enumerate(counts) for _ in range(n)]
    last = np.cumsum(counts) - 1
    first = last - np.array(counts) + 1
    guidance = [row.request.guidance if row.guided else 1.0 for row in rows]
    index = torch.tensor(np.stack([first, last]), device=device)
    return torch.tensor(source, device=device), index[0], index[1], torch.tensor(guidance, device=device)


def _wide(values_B: Tensor) -> Tensor:
    return values_B[:, None, None, None]


def _as_pixels(image: npt.NDArray[np.uint8], height: int, width: int) -> Tensor:
    """uint8 [H, W, 3] of any size -> float32 [1, 3, height, width] in [-1, 1], resized as the reference does."""
    picture = Image.fromarray(image)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1


def _decode_batches(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of the same lane, at most DECODE_BATCH together."""
    lanes: dict[object, list[Row]] = {}
    for row in rows:
        lanes.setdefault(row.lane, []).append(row)
    return [lane[i : i + DECODE_BATCH] for lane in lanes.values() for i in range(0, len(lane), DECODE_BATCH)]


def _finished(row: Row, picture: npt.NDArray[np.uint8] | None) -> Finished:
    error = Cancelled(f"cancelled after {row.step} of {len(row.table)} steps") if row.cancelled else row.error
    return Finished(row.id, row.request, None if error is not None else picture, error)


def _there(value: _T | None) -> _T:
    assert value is not None, "a row is prepared before it is stepped"
    return value
