"""One image array to PNG bytes that carry the job's parameters."""

import hashlib
import io
import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from jobs.spec import JobSpec

# Level 1 costs a third of the time of Pillow's default (6) for a few per cent more bytes; uploads share the cores
# with the engine.
COMPRESS_LEVEL = 1

# The labels that galleries and other interfaces read in the ``parameters`` chunk.
_LABELS = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_a": "Euler a",
    "dpmpp_2m": "DPM++ 2M",
    "euler_karras": "Euler Karras",
    "euler_a_karras": "Euler a Karras",
    "dpmpp_2m_karras": "DPM++ 2M Karras",
}


@dataclass(frozen=True, slots=True)
class Picture:
    """An encoded image. ``data``: PNG bytes; ``sha256``: of ``data``, lower-case hex; sizes in pixels."""

    data: bytes
    sha256: str
    width: int
    height: int
    seed: int


def encode(image: NDArray[np.uint8], spec: JobSpec, seed: int) -> Picture:
    """PNG of ``image`` (uint8 ``[H, W, 3]``) with two text chunks: ``nightshift`` (JSON) and ``parameters``.

    Nothing about the machine goes in: no paths, no host, no user, no job id.
    """
    height, width = image.shape[:2]
    chunks = PngInfo()
    chunks.add_text("nightshift", json.dumps(_parameters(spec, seed, width, height), ensure_ascii=False))
    chunks.add_text("parameters", parameters_text(spec, seed, width, height))
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=COMPRESS_LEVEL, pnginfo=chunks)
    data = buffer.getvalue()
    return Picture(data, hashlib.sha256(data).hexdigest(), width, height, seed)


def _parameters(spec: JobSpec, seed: int, width: int, height: int) -> dict[str, object]:
    job = spec.model_dump(mode="json", exclude={"images", "priority"})
    if spec.init_image is None:
        del job["init_image"], job["strength"]
    return job | {"seed": seed, "width": width, "height": height}


def parameters_text(spec: JobSpec, seed: int, width: int, height: int) -> str:
    """The text form that AUTOMATIC1111's web UI introduced and most viewers read."""
    facts = {
        "Steps": spec.steps,
        "Sampler": _LABELS.get(spec.sampler, spec.sampler),
        "CFG scale": 1 if spec.guidance is None else f"{spec.guidance:g}",
        "Seed": seed,
        "Size": f"{width}x{height}",
        "Model": spec.model,
    }
    if spec.init_image is not None:
        facts["Denoising strength"] = f"{spec.strength:g}"
    lines = [spec.prompt]
    if spec.negative_prompt:
        lines.append(f"Negative prompt: {spec.negative_prompt}")
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in facts.items())])
