"""The stage of `benchmarks.gpu` that is the reference's: its pipeline at the same sizes, eager and compiled.

A module of its own, because its library need not be installed where the rest is measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel

from benchmarks import gpu_model as gm
from benchmarks.goals import spread
from benchmarks.gpu_model import Setup
from benchmarks.gpu_stages import failed
from sd_engine.folder_writer import unet_config, vae_config

# As many as compile in the time that there is.
_SIZES = (1, 4, 16, 32)


def reference(setup: Setup) -> Iterator[dict[str, Any]]:
    """Whole pictures per second from ready prompts, in static batches: eager in both layouts, then compiled."""
    pipeline = _pipeline(setup)
    for name, layout in (("eager", torch.contiguous_format), ("eager, channels-last", torch.channels_last)):
        for module in (pipeline.unet, pipeline.vae):
            module.to(memory_format=layout)
        yield from _sizes(setup, pipeline, name)
    # What its own documentation recommends for speed; the layout stays channels-last.
    pipeline.fuse_qkv_projections()
    pipeline.unet = torch.compile(pipeline.unet, backend=setup.compiler, dynamic=False)
    yield from _sizes(setup, pipeline, "compiled, channels-last, fused")


def _pipeline(setup: Setup) -> Any:
    configs = setup.configs
    with torch.device(setup.device):
        unet = UNet2DConditionModel.from_config(unet_config(configs.unet))
        vae = AutoencoderKL.from_config(vae_config(configs.vae, setup.side))
    pipeline: Any = StableDiffusionPipeline(
        vae=vae.to(setup.dtype).eval(), unet=unet.to(setup.dtype).eval(), text_encoder=None, tokenizer=None,
        scheduler=DPMSolverMultistepScheduler(beta_schedule="scaled_linear", use_karras_sigmas=True, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _sizes(setup: Setup, pipeline: Any, name: str) -> Iterator[dict[str, Any]]:
    for pictures in (size for size in setup.sizes if size in _SIZES):
        _, _, texts = gm.inputs(setup, pictures, setup.dtype)

        def draw(texts: torch.Tensor = texts) -> None:
            pipeline(
                prompt_embeds=texts, negative_prompt_embeds=texts, num_inference_steps=setup.steps,
                height=setup.side, width=setup.side, output_type="np",
            )  # fmt: skip

        pipeline.vae.use_slicing = pictures > 16  # at once, the decoder's maps would have more than 2^31 numbers
        try:
            took = spread(gm.times(setup, draw, min(3, setup.repeats)), 5)
        except Exception as error:
            yield {"way": name, "pictures": pictures, **failed(error)}
            continue
        yield {"way": name, "pictures": pictures, "dtype": str(setup.dtype),
               "images_per_s": pictures / took["median"], "seconds": took}  # fmt: skip
