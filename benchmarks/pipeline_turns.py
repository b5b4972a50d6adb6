"""One turn of `benchmarks.pipeline`: pictures drawn together by us, or by the reference, and where their time went."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from sd_engine import Engine, Model, Request
from sd_engine.row import Row
from sd_engine.runner import Runner

STEPS = 20
GUIDANCE = 7.5
PROMPT, NEGATIVE = "a red star on a white background", "blurry"

Pictures = Sequence[npt.NDArray[np.uint8]]


@dataclass(frozen=True, slots=True)
class Turn:
    """Some pictures drawn together: seconds before the first step, of a step (the median), and after the last.

    unet_s: of a U-Net call (the median), where it was timed; the rest of a step is the engine's.
    """

    pictures: int
    before_s: float
    step_s: float
    after_s: float
    unet_s: float | None = None

    @classmethod
    def of(cls, pictures: int, began: float, ends: Sequence[float], finished: float) -> Turn:
        """ends: when each step had ended. The first step counts as long as the others, the rest as before it."""
        if len(ends) < 2:
            raise ValueError(f"{len(ends)} steps: at least 2 are needed, the first one may warm things up")
        step_s = statistics.median(later - earlier for earlier, later in pairwise(ends))
        return cls(pictures, max(0.0, ends[0] - began - step_s), step_s, finished - ends[-1])

    @property
    def whole_s(self) -> float:
        """Of a picture of 20 steps; computed where fewer were made."""
        return self.before_s + STEPS * self.step_s + self.after_s

    @property
    def images_per_hour(self) -> float:
        return 3600 * self.pictures / self.whole_s

    @property
    def outside_unet(self) -> float | None:
        """The share of a step that is not the U-Net's."""
        return None if self.unet_s is None else 1 - self.unet_s / self.step_s


class TimedRunner(Runner):
    """The engine's own, with the moments at which its steps ended."""

    ends: list[float]

    def denoise(self, rows: Sequence[Row], too_large: Callable[[Sequence[Row]], None]) -> None:
        """As `Runner.denoise`."""
        super().denoise(rows, too_large)
        _settle(self.models[rows[0].lane.model].device)
        self.ends.append(time.perf_counter())


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def draw_ours(model: Model, side: int, count: int, steps: int) -> tuple[Turn, Pictures]:
    """So many pictures in one pack."""
    requests = [
        Request(PROMPT, negative_prompt=NEGATIVE, seed=seed, steps=steps, guidance=GUIDANCE, sampler="ddim",
                width=side, height=side)
        for seed in range(count)
    ]  # fmt: skip
    engine = Engine(model, max_units=2 * count * (side // 8) ** 2, make_runner=TimedRunner)
    assert isinstance(engine.runner, TimedRunner)
    engine.runner.ends = []
    with _timed(model.unet, model.device) as calls_s:
        began = time.perf_counter()
        pictures = engine.render(requests)
        turn = Turn.of(count, began, engine.runner.ends, time.perf_counter())
    return replace(turn, unet_s=statistics.median(calls_s[1:])), pictures


@contextmanager
def _timed(unet: nn.Module, device: torch.device) -> Iterator[list[float]]:
    """The seconds of each call of the U-Net."""
    calls_s, began = list[float](), list[float]()

    def begin(*_: object) -> None:
        _settle(device)
        began.append(time.perf_counter())

    def end(*_: object) -> None:
        _settle(device)
        calls_s.append(time.perf_counter() - began[-1])

    hooks = unet.register_forward_pre_hook(begin), unet.register_forward_hook(end)
    try:
        yield calls_s
    finally:
        for hook in hooks:
            hook.remove()


def draw_reference(pipeline: Any, side: int, count: int, steps: int) -> tuple[Turn, Pictures]:
    """So many pictures in one static batch."""
    ends: list[float] = []

    def at_end(_: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        _settle(torch.device(pipeline.device))
        ends.append(time.perf_counter())
        return values

    began = time.perf_counter()
    images = pipeline(
        [PROMPT] * count,
        negative_prompt=[NEGATIVE] * count,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        width=side,
        height=side,
        generator=[torch.Generator().manual_seed(seed) for seed in range(count)],
        output_type="np",
        callback_on_step_end=at_end,
    ).images
    turn = Turn.of(count, began, ends, time.perf_counter())
    return turn, [np.rint(image * 255).astype(np.uint8) for image in images]


def fastest_layout(pipeline: Any, side: int) -> str:
    """Give the reference's U-Net and VAE the memory layout in which its U-Net is faster here, by one call each."""
    layouts = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
    config = pipeline.unet.config
    x_UCHW = torch.randn(2, config.in_channels, side // 8, side // 8).to(pipeline.device, pipeline.unet.dtype)
    context_UTD = torch.randn(2, 77, config.cross_attention_dim).to(x_UCHW)
    took = {}
    for name, layout in layouts.items():
        pipeline.unet.to(memory_format=layout)
        with torch.inference_mode():
            for _ in range(2):  # the second one counts
                began = time.perf_counter()
                pipeline.unet(x_UCHW.to(memory_format=layout), 500, context_UTD).sample.cpu()
                took[name] = time.perf_counter() - began
    best = min(took, key=lambda name: took[name])
    for module in (pipeline.unet, pipeline.vae):
        module.to(memory_format=layouts[best])
    return best
