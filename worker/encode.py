"""One image array to PNG bytes that carry the job's parameters."""

import hashlib
import io
import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from jobs.fields import PICTURES
from jobs.samplers import TABLE
from jobs.spec import JobSpec
from jobs.spec_checks import first_side, idle_fields

# Level 1 costs a third to a fifth of the time of Pillow's default (6) for a fifth more bytes; uploads share the cores
# with the engine.
COMPRESS_LEVEL = 1

# A1111's words for our values.
_RNG = {"cpu": "CPU", "cuda": "NV"}
_UPSCALER = {"latent": "Latent", "pixel": "Lanczos"}


@dataclass(frozen=True, slots=True)
class Picture:
    """An encoded image. ``data``: PNG bytes; ``sha256``: of ``data``, lower-case hex; sizes in pixels."""

    data: bytes
    sha256: str
    width: int
    height: int
    seed: int


def encode(image: NDArray[np.uint8], spec: JobSpec, seed: int, *, parameters: bool = True) -> Picture:
    """PNG of ``image`` (uint8 ``[H, W, 3]``) with two text chunks: ``nightshift`` (JSON) and ``parameters``.

    Nothing about the machine goes in: no paths, no host, no user, no job id. Without ``parameters``: no text at all.
    """
    height, width = image.shape[:2]
    # What draws the picture again is the size before a second pass.
    times = spec.upscale
    first = (width, height) if times is None else (first_side(width, times), first_side(height, times))
    chunks = PngInfo()
    if parameters:
        chunks.add_text("nightshift", json.dumps(_parameters(spec, seed, *first), ensure_ascii=False))
        chunks.add_text("parameters", parameters_text(spec, seed, *first))
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=COMPRESS_LEVEL, pnginfo=chunks)
    data = buffer.getvalue()
    return Picture(data, hashlib.sha256(data).hexdigest(), width, height, seed)


def _parameters(spec: JobSpec, seed: int, width: int, height: int) -> dict[str, object]:
    job = spec.model_dump(mode="json", exclude={"images", "priority"} | idle_fields(dict(spec)))
    pictures = {field for field in PICTURES if getattr(spec, field) is None}
    return {name: job[name] for name in job if name not in pictures} | {"seed": seed, "width": width, "height": height}


def parameters_text(spec: JobSpec, seed: int, width: int, height: int) -> str:
    """The text form that AUTOMATIC1111's web UI introduced and most viewers read; size: of the first pass."""
    facts = {
        "Steps": spec.steps,
        "Sampler": TABLE[spec.sampler].a1111,
        "CFG scale": 1 if spec.guidance is None else f"{spec.guidance:g}",
        "Seed": seed,
        "Size": f"{width}x{height}",
        "Model": spec.model,
        **_denoising(spec),
        "Clip skip": spec.clip_skip if spec.clip_skip > 1 else None,
        "RNG": _RNG[spec.noise],
        "Eta DDIM": f"{spec.eta:g}" if spec.eta else None,
        "CFG rescale": f"{spec.guidance_rescale:g}" if spec.guidance_rescale else None,
        "Skip Early CFG": f"{spec.guidance_start:g}" if spec.guidance_start else None,
        "CFG stop": f"{spec.guidance_stop:g}" if spec.guidance_stop < 1 else None,
        "DeepCache interval": spec.deepcache_interval if spec.deepcache_interval > 1 else None,
        "Token merging ratio": f"{spec.token_merging_ratio:g}" if spec.token_merging_ratio else None,
        "VAE Decoder": None if spec.decoder == "vae" else "TAESD",
        "Mask blur": None if spec.mask is None else f"{spec.mask_blur:g}",
        **_second_pass(spec),
    }
    lines = [spec.prompt]
    if spec.negative_prompt:
        lines.append(f"Negative prompt: {spec.negative_prompt}")
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in facts.items() if value is not None)])


def _denoising(spec: JobSpec) -> dict[str, str]:
    """A1111 has one strength: of the picture that is started from, or else of the second pass."""
    if spec.init_image is not None:
        return {"Denoising strength": f"{spec.strength:g}"}
    return {} if spec.upscale is None else {"Denoising strength": f"{spec.upscale_strength:g}"}


def _second_pass(spec: JobSpec) -> dict[str, object]:
    if spec.upscale is None:
        return {}
    own = {"Hires strength": f"{spec.upscale_strength:g}"} if spec.init_image is not None else {}
    return {
        "Hires upscale": f"{spec.upscale:g}",
        "Hires steps": spec.upscale_steps,
        "Hires upscaler": _UPSCALER[spec.upscale_by],
        **own,
    }
