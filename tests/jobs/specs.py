"""Valid specs of every kind, for tests that promise something of all of them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from jobs.fields import MAX_SEED
from jobs.samplers import SAMPLERS
from jobs.spec import JobSpec

TEXT = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=80).filter(
    lambda text: text.strip()
)
SIDE = st.none() | st.integers(8, 256).map(lambda n: n * 8)

INTERVAL = st.lists(st.floats(0, 1), min_size=2, max_size=2, unique=True).map(sorted)


def share(steps: int) -> st.SearchStrategy[float]:
    """A strength that leaves at least one of these steps."""
    return st.floats(1 / steps, 1).filter(lambda strength: int(steps * strength) >= 1)


@st.composite
def specs(draw: st.DrawFn, *, init_image: str | None = None, mask: str | None = None) -> JobSpec:
    """Any valid spec; with these pictures, or without any."""
    fields: dict[str, Any] = draw(_BASE)
    if init_image is not None:
        fields |= {"init_image": init_image, "strength": draw(share(fields["steps"]))}
        fields |= {"resize": draw(st.sampled_from(["stretch", "crop", "fill"]))}
    if mask is not None:
        fields |= {"mask": mask, "mask_blur": draw(st.floats(0, 256))}
    if draw(st.booleans()):
        fields |= _second_pass(draw, fields)
    if fields["sampler"] == "ddim":
        fields["eta"] = draw(st.floats(0, 1))
    if (fields["guidance"] or 0) > 1:
        fields["guidance_rescale"] = draw(st.floats(0, 1))
        fields["guidance_start"], fields["guidance_stop"] = draw(INTERVAL)
    return JobSpec(**fields)


def _second_pass(draw: st.DrawFn, fields: dict[str, Any]) -> dict[str, Any]:
    steps = draw(st.none() | st.integers(2, 60))
    largest = max(fields["width"] or 512, fields["height"] or 512)
    return {
        "upscale": draw(st.floats(1, min(4, 4096 / largest), exclude_min=True)),
        "upscale_strength": draw(share(steps or fields["steps"])),
        "upscale_steps": steps,
        "upscale_by": draw(st.sampled_from(["latent", "pixel"])),
    }


_BASE = st.fixed_dictionaries(
    {
        "prompt": TEXT,
        "negative_prompt": TEXT | st.just(""),
        "width": SIDE,
        "height": SIDE,
        "steps": st.integers(1, 60),
        "guidance": st.none() | st.floats(0, 50),
        "sampler": st.sampled_from(SAMPLERS) | st.just("ddim"),
        "clip_skip": st.integers(1, 12),
        "deepcache_interval": st.integers(1, 20),
        "token_merging_ratio": st.floats(0, 0.75),
        "decoder": st.sampled_from(["vae", "tiny"]),
        "noise": st.sampled_from(["cpu", "cuda"]),
        "seed": st.none() | st.integers(0, MAX_SEED - 3),
        "images": st.integers(1, 4),
        "model": st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True),
        "priority": st.integers(0, 9),
    }
)
