"""Pictures to latents and back, within the memory and the range of numbers that the device has.

Legend of the shape suffixes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from sd_engine.halving import is_out_of_memory
from sd_engine.layers import spare_memory
from sd_engine.model import Model
from sd_engine.request import Decoder
from sd_engine.row import Lane, Row
from sd_engine.vae import Vae, Way
from sd_engine.vae_tiles import decode_in_tiles, encode_in_tiles

# Pictures decoded by one call, and their latent cells (four of 512 x 512): the VAE's full-size feature maps take far
# more memory than the U-Net's.
DECODE_BATCH = 16
DECODE_CELLS = 4 * 64 * 64

# Pictures of more pixels go through the VAE tile by tile. SD's decoder takes 2 GB in float16 for this many at once,
# 7.7 GB for 2048 x 2048, and 0.6 GB in tiles (`benchmarks/vae_memory.py`); tiles take the time to travel, too.
WHOLE_PIXELS = 1024 * 1024


def encode_picture(model: Model, pixels_3HW: Tensor, noise_CHW: Tensor, *, whole_pixels: int = WHOLE_PIXELS) -> Tensor:
    """A picture float32 [3, H, W] in [-1, 1], and noise for the sample -> its scaled latent, float32 on the device.

    A picture of more than whole_pixels goes in tiles, and so does one that memory does not suffice for at once. What
    half precision makes not finite is encoded once more in float32.
    """
    pixels_BCHW, noise_BCHW = pixels_3HW[None].to(model.device), noise_CHW[None].to(model.device)

    def encode(vae: Vae, x_BCHW: Tensor) -> Tensor:
        run = partial(vae.encode, x_BCHW, noise_BCHW.to(x_BCHW.dtype))
        in_tiles = partial(encode_in_tiles, vae.encoder)
        return _once_or_in_tiles(run, in_tiles, x_BCHW.shape[-2:].numel() <= whole_pixels).float()

    with model.at_work("vae"):
        return _in_range(encode, model.vae, pixels_BCHW, model.dtype)[0]


def decode_latents(model: Model, latents_BCHW: Tensor, *, whole_pixels: int = WHOLE_PIXELS) -> Tensor:
    """Scaled latents -> pictures float32 [B, 3, H, W] on the CPU, about [-1, 1], not clamped.

    Pictures of more than whole_pixels go in tiles, and so does a single one that memory does not suffice for at once.
    A picture that half precision makes not finite is decoded once more, alone, in float32.
    """
    pixels = latents_BCHW.shape[-2:].numel() * model.factor**2

    def decode(vae: Vae, z_BCHW: Tensor) -> Tensor:
        in_tiles = partial(decode_in_tiles, vae.decoder)
        return (
            _once_or_in_tiles(partial(vae.decode, z_BCHW), in_tiles, pixels <= whole_pixels, len(z_BCHW)).float().cpu()
        )

    with model.at_work("vae"):
        return _in_range(decode, model.vae, latents_BCHW, model.dtype)


def decode_tiny(model: Model, latents_BCHW: Tensor, *, whole_pixels: int = WHOLE_PIXELS) -> Tensor:
    """As `decode_latents`, by the model's tiny decoder: another picture, nearly the same.

    Pictures of more than whole_pixels go in strips. A pixel depends on latent cells near it alone, so strips that are
    seen with so many more around give the same picture.
    """
    assert model.tiny_decoder is not None, "a request for it is refused where there is none"
    factor, reach = model.factor, model.tiny_decoder.config.reach
    height, width = latents_BCHW.shape[2:]
    strip = max(1, whole_pixels // (width * factor**2))
    strips = []
    for top in range(0, height, strip):
        first, last = max(0, top - reach), min(height, top + strip)
        pixels_BCHW = model.tiny_decoder(latents_BCHW[:, :, first : last + reach].to(model.dtype))
        strips.append(pixels_BCHW[:, :, (top - first) * factor : (last - first) * factor].float().cpu())
    return torch.cat(strips, dim=2)


def rounded(pixels_BCHW: Tensor) -> Tensor:
    """Decoded pictures float32 [B, 3, H, W] -> uint8 [B, H, W, 3]; what is not finite becomes black."""
    return (pixels_BCHW / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).mul(255).round().nan_to_num().to(torch.uint8)


def decode_batches(rows: Iterable[Row], limit: int = DECODE_BATCH) -> list[list[Row]]:
    """Rows that are decoded together: of one lane by one decoder, at most `limit`, of at most DECODE_CELLS cells.

    A row that has more cells by itself is decoded alone. Raises ValueError for a limit below 1.
    """
    if limit < 1:
        raise ValueError(f"limit={limit} is not allowed: at least one picture is decoded by a call")
    alike: dict[tuple[Lane, Decoder], list[Row]] = {}
    for row in rows:
        alike.setdefault((row.lane, row.request.decoder), []).append(row)
    return [batch for (lane, _), members in alike.items() for batch in _batches(members, min(limit, _fitting(lane)))]


def _fitting(lane: Lane) -> int:
    return max(1, DECODE_CELLS // lane.cells)


def _batches(rows: list[Row], most: int) -> list[list[Row]]:
    return [rows[i : i + most] for i in range(0, len(rows), most)]


def _once_or_in_tiles(run: Callable[[Way | None], Tensor], in_tiles: Way, at_once: bool, pictures: int = 1) -> Tensor:
    """Run at once where that is wished and memory suffices. Several pictures that do not fit are the caller's to part.

    Neither way changes a picture: they differ by rounding.
    """
    if at_once:
        try:
            return run(None)
        except Exception as error:
            if pictures > 1 or not is_out_of_memory(error):
                raise
    # Here, and not in the handler: there the error still holds the tensors of the failed call.
    return run(in_tiles)


def _in_range(work: Callable[[Vae, Tensor], Tensor], vae: Vae, x_BCHW: Tensor, dtype: torch.dtype) -> Tensor:
    """Work in this dtype, and in float32 for each picture that came out not finite though it went in finite.

    The VAE of SD 1.x and 2.x goes beyond float16's 65504 for some pictures.
    """
    out_BCHW = work(vae, x_BCHW.to(dtype))
    if dtype == torch.float32:
        return out_BCHW
    lost = [i for i in range(len(x_BCHW)) if not _finite(out_BCHW[i]) and _finite(x_BCHW[i])]
    wide = _in_float32(vae) if lost else vae
    for i in lost:
        out_BCHW[i] = work(wide, x_BCHW[i : i + 1].float())[0]
    return out_BCHW


def _in_float32(vae: Vae) -> Vae:
    """A copy for the time of a call: the weights of the model itself are never touched."""
    with torch.device("meta"):
        wide = Vae(vae.config)
    spare_memory(wide, True)  # for a call or a few: what is kept for later ones would not be used
    wide.load_state_dict({name: tensor.float() for name, tensor in vae.state_dict().items()}, assign=True)
    return wide.requires_grad_(False).eval()


def _finite(x: Tensor) -> bool:
    return bool(x.isfinite().all())
