"""A process of `benchmarks.cold` that is the reference's: its pipeline, by the fastest and smallest way it has to load.

No import here that the pipeline would not make itself: it imports its parts when it needs them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from benchmarks.cold_process import answer

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def load(path: str, dtype: str, tokenizer: str) -> tuple[Any, Iterable[Tensor]]:
    """A diffusers folder, which has its tokenizer."""
    pipeline: Any = StableDiffusionPipeline.from_pretrained(
        path, torch_dtype=_DTYPES[dtype], low_cpu_mem_usage=True, use_safetensors=True, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    modules = (pipeline.text_encoder, pipeline.unet, pipeline.vae)
    return pipeline, (tensor for module in modules for tensor in module.state_dict().values())


def draw(pipeline: Any, side: int | None) -> None:
    """One picture: guided, 20 steps."""
    asked = {"num_inference_steps": 20, "guidance_scale": 5.0, "width": side, "height": side}
    with torch.inference_mode():
        pipeline("a red star", **asked, generator=torch.Generator().manual_seed(1))


if __name__ == "__main__":
    answer(load, draw)
