"""The samplers by name, and the table of one image.

The common scheme of names: `_karras` and `_exponential` say how the noise levels are spread, without them they follow
the model's timesteps. Samplers on whole timesteps have no such choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Final, Protocol, get_args

import numpy as np

from sd_engine.errors import InvalidRequest
from sd_engine.samplers.layouts import Spread, exploding, preserving
from sd_engine.samplers.multistep import dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde
from sd_engine.samplers.onestage import euler, euler_a, lms
from sd_engine.samplers.pndm import pndm
from sd_engine.samplers.table import StepTable, Way, tabulate
from sd_engine.samplers.twostage import dpm2, dpm2_a, dpmpp_2s_a, dpmpp_sde, heun
from sd_engine.samplers.unipc import unipc
from sd_engine.samplers.whole import ddim, ddpm, lcm
from sd_engine.schedules import NoiseSchedule

_OnTimesteps = Callable[[NoiseSchedule, int, int], Way]  # (schedule, steps, first step)


class _OnSigmas(Protocol):
    def __call__(self, schedule: NoiseSchedule, steps: int, start: int, spread: Spread) -> Way: ...


_ON_TIMESTEPS: Final[Mapping[str, _OnTimesteps]] = {"ddpm": ddpm, "ddim": ddim, "pndm": pndm, "lcm": lcm}

_ON_SIGMAS: Final[Mapping[str, _OnSigmas]] = {
    "lms": partial(exploding, lms),
    "euler": partial(exploding, euler),
    "euler_a": partial(exploding, euler_a),
    "heun": partial(exploding, heun),
    "dpm2": partial(exploding, dpm2, whole_karras=True),
    "dpm2_a": partial(exploding, dpm2_a, whole_karras=True),
    "dpmpp_2m": partial(preserving, dpmpp_2m),
    "dpmpp_2m_sde": partial(preserving, dpmpp_2m_sde),
    "dpmpp_sde": partial(exploding, dpmpp_sde),
    "dpmpp_2s_a": partial(exploding, dpmpp_2s_a),
    "dpmpp_3m_sde": partial(preserving, dpmpp_3m_sde),
    "unipc": partial(preserving, unipc, floors_cosine=False),
}

_WAYS: Final[Mapping[str, _OnTimesteps]] = dict(_ON_TIMESTEPS) | {
    name if spread == "plain" else f"{name}_{spread}": partial(on_sigmas, spread=spread)
    for name, on_sigmas in _ON_SIGMAS.items()
    for spread in get_args(Spread)
}
SAMPLERS: Final[tuple[str, ...]] = tuple(_WAYS)


@lru_cache(maxsize=512)
def step_table(
    sampler: str, schedule: NoiseSchedule, steps: int, strength: float | None = None, *, eta: float = 0.0
) -> StepTable:
    """The table of one image: `steps` steps for txt2img (strength None), the last `strength` of them for img2img.

    img2img takes the last int(steps * strength) steps, as the reference's pipeline does. Where that is none, we take
    the last one: the reference fails there, and a small strength should mean a small change. Samplers of two stages
    have two lines a step but for the last, `pndm` one line more than steps.
    Raises InvalidRequest for an unknown sampler, for an eta that the sampler does not have, and for a count of steps
    that the schedule cannot lay out.
    """
    if sampler not in _WAYS:
        raise InvalidRequest("sampler", sampler, "one of " + ", ".join(SAMPLERS))
    if eta and sampler != "ddim":
        raise InvalidRequest("eta", eta, f"0 with sampler {sampler}", "take sampler ddim, the only one that has it")
    kept = steps if strength is None else max(1, min(int(steps * strength), steps))
    lay_out = partial(ddim, eta=eta) if eta else _WAYS[sampler]
    try:
        with np.errstate(divide="raise", invalid="raise"):
            table = tabulate(lay_out(schedule, steps, steps - kept), schedule.prediction)
    except InvalidRequest:
        raise
    except (ArithmeticError, ValueError):  # two noise levels coincide, or even rise: refused, not drawn
        table = None
    if table is None or not (np.isfinite(table.lines).all() and np.isfinite(table.mix).all()):
        raise InvalidRequest("steps", steps, f"too many for {sampler} on this model's schedule", "take fewer")
    return table
