"""The samplers by their names: ours, and those that AUTOMATIC1111's web UI and ComfyUI have for them.

The names are the engine's; repeated here because a producer has no engine. A test holds the two equal.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from jobs.errors import shown

DEFAULT = "dpmpp_2m_karras"


@dataclass(frozen=True, slots=True)
class Family:
    """One algorithm. `comfy`: ComfyUI's sampler_name, none where it has no such sampler; `also`: its further names.

    `scheduler`: ComfyUI's name of the only spacing it is drawn with; none where it has all of SPACINGS.
    """

    name: str
    a1111: str
    comfy: str | None
    scheduler: str | None = None
    also: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Spacing:
    """How the noise levels are spaced: what it adds to our name and to A1111's label, and ComfyUI's scheduler."""

    name: str
    a1111: str
    comfy: str


@dataclass(frozen=True, slots=True)
class Names:
    """One sampler: our name, A1111's label, ComfyUI's (sampler_name, scheduler), and what else is accepted for it."""

    name: str
    a1111: str
    comfy: tuple[str, str] | None
    accepted: tuple[str, ...]


FAMILIES: Sequence[Family] = (
    Family("ddpm", "DDPM", "ddpm", "normal"),
    Family("ddim", "DDIM", "ddim", "ddim_uniform"),
    Family("pndm", "PLMS", None, "normal"),
    Family("lcm", "LCM", "lcm", "sgm_uniform"),
    Family("lms", "LMS", "lms"),
    Family("euler", "Euler", "euler"),
    Family("euler_a", "Euler a", "euler_ancestral"),
    Family("heun", "Heun", "heun"),
    Family("dpm2", "DPM2", "dpm_2"),
    Family("dpm2_a", "DPM2 a", "dpm_2_ancestral"),
    Family("dpmpp_2m", "DPM++ 2M", "dpmpp_2m"),
    Family("dpmpp_2m_sde", "DPM++ 2M SDE", "dpmpp_2m_sde", also=("dpmpp_2m_sde_gpu",)),
    Family("dpmpp_sde", "DPM++ SDE", "dpmpp_sde", also=("dpmpp_sde_gpu",)),
    Family("dpmpp_2s_a", "DPM++ 2S a", "dpmpp_2s_ancestral"),
    Family("dpmpp_3m_sde", "DPM++ 3M SDE", "dpmpp_3m_sde", also=("dpmpp_3m_sde_gpu",)),
    Family("unipc", "UniPC", "uni_pc_bh2", also=("uni_pc",)),
)
PLAIN = Spacing("", "", "normal")
SPACINGS: Sequence[Spacing] = (
    PLAIN,
    Spacing("karras", "Karras", "karras"),
    Spacing("exponential", "Exponential", "exponential"),
)


def members(family: Family) -> Iterator[Names]:
    """The samplers of a family, one for each spacing that it is drawn with."""
    for spacing in SPACINGS if family.scheduler is None else (PLAIN,):
        name = "_".join(filter(None, (family.name, spacing.name)))
        label = " ".join(filter(None, (family.a1111, spacing.a1111)))
        scheduler = family.scheduler or spacing.comfy
        theirs = [one for one in (family.comfy, *family.also) if one is not None]
        alone = theirs if spacing is PLAIN else []
        accepted = (label, *alone, *(f"{one} {scheduler}" for one in theirs))
        comfy = None if family.comfy is None else (family.comfy, scheduler)
        yield Names(name, label, comfy, accepted)


TABLE: Mapping[str, Names] = {names.name: names for family in FAMILIES for names in members(family)}
SAMPLERS: tuple[str, ...] = tuple(TABLE)


def _folded(text: str) -> str:
    """What two spellings of one name have in common: `DPM++ 2M Karras` and `dpmpp_2m_karras` are one."""
    return re.sub(r"[\s_-]+", "", text.casefold().replace("++", "pp"))


_OURS: Mapping[str, str] = {
    _folded(one): names.name for names in TABLE.values() for one in (names.name, *names.accepted)
}


def our_name(text: str) -> str:
    """Our name of a sampler, from ours, A1111's label, or ComfyUI's names (`euler_ancestral`, `dpmpp_2m karras`).

    Raises ValueError, with the nearest name where one is near.
    """
    if text in TABLE:
        return text
    folded = _folded(text)
    if folded in _OURS:
        return _OURS[folded]
    near = difflib.get_close_matches(folded, _OURS, n=1, cutoff=0.75)
    hint = f"; did you mean {_OURS[near[0]]}?" if near else ""
    raise ValueError(f"{shown(text)} is no sampler{hint}")
