"""Does the shipped model draw what it is told? Random prompts, judged by a checker of its own.

    python -m benchmarks.mini_quality --prompts 100 --seed 8

Prints a table and writes `benchmarks/results/mini_quality.json`. The checker shares nothing with the training code:
its palette and its shapes are written here a second time, as formulas, so that a mistake there cannot hide here.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.report import RESULTS, write
from sd_engine import Engine, Request, load_model, shipped_model

Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

PALETTE = {
    "red": (0xDD, 0x1E, 0x22),
    "green": (0x28, 0xA0, 0x3C),
    "blue": (0x23, 0x4B, 0xD8),
    "yellow": (0xF8, 0xDC, 0x28),
    "orange": (0xF9, 0x86, 0x14),
    "purple": (0x7C, 0x2D, 0xA4),
    "pink": (0xFA, 0x96, 0xBE),
    "white": (0xFA, 0xFA, 0xFA),
    "black": (0x10, 0x10, 0x12),
}
GRID = 48


@dataclass(frozen=True, slots=True)
class Seen:
    """What the checker sees on a picture; `fit` is the overlap with the best shape, from 0 to 1."""

    background: str
    colour: str
    shape: str
    fit: float


def nearest_colour(rgb: npt.NDArray[np.floating]) -> str:
    """The name of the palette's nearest colour, by the low-cost approximation of perceived distance ("redmean")."""

    def distance(name: str) -> float:
        r, g, b = (float(a) - float(c) for a, c in zip(rgb, PALETTE[name], strict=True))
        mean = (float(rgb[0]) + PALETTE[name][0]) / 2
        return (2 + mean / 256) * r * r + 4 * g * g + (2 + (255 - mean) / 256) * b * b

    return min(PALETTE, key=distance)


def shape_masks() -> dict[str, Mask]:
    """Each shape as a formula on a square of [-1, 1], y downwards, cut to its bounding box and scaled to the grid."""
    y, x = np.mgrid[-1.5:1.5:241j, -1.5:1.5:241j]
    angle, radius = np.arctan2(x, -y), np.hypot(x, y)
    # A five-pointed star: the straight line from a tip (radius 1) to a notch (0.41), repeated in ten mirrored sectors.
    sector = np.abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    tip, notch = np.array([1.0, 0.0]), 0.41 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    px, py = radius * np.cos(sector), radius * np.sin(sector)
    star = (notch[0] - tip[0]) * (py - tip[1]) - (notch[1] - tip[1]) * (px - tip[0]) > 0
    t = np.linspace(0, 2 * np.pi, 400)
    heart_x, heart_y = 16 * np.sin(t) ** 3, -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    shapes = {
        "circle": radius < 1,
        "square": (np.abs(x) < 1) & (np.abs(y) < 1),
        "triangle": (y < 0.5) & (y > -1 + np.sqrt(3) * np.abs(x)),
        "star": star,
        "heart": _inside(x * 16, y * 16, heart_x, heart_y),
        "cross": ((np.abs(x) < 0.32) & (np.abs(y) < 1)) | ((np.abs(y) < 0.32) & (np.abs(x) < 1)),
    }
    return {name: np.asarray(mask, dtype=bool) for name, mask in shapes.items()}


def _inside(
    x: npt.NDArray[np.floating], y: npt.NDArray[np.floating], px: npt.NDArray[np.floating], py: npt.NDArray[np.floating]
) -> Mask:
    """Even-odd rule: whether points lie inside a closed polygon."""
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in itertools.pairwise([*zip(px, py, strict=True), (px[0], py[0])]):
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < (bx - ax) * (y - ay) / (by - ay) + ax)
    return inside


def _boxed(mask: Mask) -> Mask:
    """Cut to the bounding box, put in the middle of a square (so that proportions count) and scale to the grid."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    cut = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    side = max(cut.shape)
    square = np.zeros((side, side), dtype=np.uint8)
    top, left = (side - cut.shape[0]) // 2, (side - cut.shape[1]) // 2
    square[top : top + cut.shape[0], left : left + cut.shape[1]] = cut * 255
    return np.asarray(Image.fromarray(square).resize((GRID, GRID), Image.Resampling.BOX)) > 127


def _templates() -> list[tuple[str, Mask]]:
    turned = []
    for name, mask in shape_masks().items():
        image = Image.fromarray((mask * 255).astype(np.uint8))
        turned += [(name, _boxed(np.asarray(image.rotate(degrees)) > 127)) for degrees in (-8, -4, 0, 4, 8)]
    return turned


TEMPLATES = _templates()


def _largest_part(mask: Mask) -> Mask:
    """The largest 4-connected part of a mask."""
    best, left = np.zeros_like(mask), mask.copy()
    while left.any():
        part = np.zeros_like(mask)
        part[tuple(np.argwhere(left)[0])] = True
        while True:
            grown = part.copy()
            grown[1:] |= part[:-1]
            grown[:-1] |= part[1:]
            grown[:, 1:] |= part[:, :-1]
            grown[:, :-1] |= part[:, 1:]
            grown &= left
            if (grown == part).all():
                break
            part = grown
        left &= ~part
        if part.sum() > best.sum():
            best = part
    return best


def see(image: Pixels) -> Seen:
    """Read background, colour and shape off a picture, uint8 [H, W, 3]."""
    pixels = image.astype(np.float64)
    border = np.concatenate([pixels[:4].reshape(-1, 3), pixels[-4:].reshape(-1, 3), pixels[:, :4].reshape(-1, 3)])
    background = np.median(border, axis=0)
    away = np.sqrt(((pixels - background) ** 2).sum(-1))
    # Half-way between background and thing is the edge; the thing's distance is that of the clearest tenth.
    threshold = max(40.0, 0.5 * float(np.quantile(away, 0.97)))
    thing = _largest_part(away > threshold)
    # A speck is no thing, and what fills the picture (noise does) is none either: large ones cover less than half.
    if thing.sum() < 20 or thing.mean() > 0.6:
        return Seen(nearest_colour(background), "nothing", "nothing", 0.0)
    colour = nearest_colour(np.median(pixels[thing & (away > np.median(away[thing]) * 0.8)], axis=0))
    boxed = _boxed(thing)
    fits = [((boxed & template).sum() / (boxed | template).sum(), name) for name, template in TEMPLATES]
    fit, shape = max(fits)
    return Seen(nearest_colour(background), colour, shape, float(fit))


@dataclass(frozen=True, slots=True)
class Wanted:
    """A prompt and what must be seen."""

    prompt: str
    background: str
    colour: str
    shape: str


def random_prompt(rng: random.Random) -> Wanted:
    """A prompt of the form "a [small|large] COLOUR SHAPE on a COLOUR background"."""
    colour, background = rng.sample(sorted(PALETTE), 2)
    shape, size = rng.choice(sorted(shape_masks())), rng.choice(["", "small ", "large "])
    return Wanted(f"a {size}{colour} {shape} on a {background} background", background, colour, shape)


def measure(
    model_folder: Path, prompts: int, seed: int, steps: int, guidance: float, sampler: str
) -> dict[str, object]:
    """Render random prompts and judge them; returns the shares of right answers and the misses."""
    rng = random.Random(seed)
    wanted = [random_prompt(rng) for _ in range(prompts)]
    engine = Engine(load_model(model_folder))
    requests = [
        Request(w.prompt, seed=seed * 100_000 + i, steps=steps, guidance=guidance, sampler=sampler)
        for i, w in enumerate(wanted)
    ]
    seen = [see(image) for image in engine.render(requests)]
    pairs = list(zip(wanted, seen, strict=True))
    both = [s.colour == w.colour and s.background == w.background for w, s in pairs]
    shape = [s.shape == w.shape for w, s in pairs]
    misses = [
        f"{w.prompt}: saw {s.colour} {s.shape} on {s.background}"
        for (w, s), right in zip(pairs, np.logical_and(both, shape), strict=True)
        if not right
    ]
    return {
        "prompts": prompts,
        "seed": seed,
        "steps": steps,
        "guidance": guidance,
        "sampler": sampler,
        "both_colours_right": float(np.mean(both)),
        "shape_right": float(np.mean(shape)),
        "all_right": float(np.mean(np.logical_and(both, shape))),
        "misses": misses,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, help="model folder (default: the shipped one)")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--seed", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--sampler", default="euler_a")
    parser.add_argument("--out", type=Path, default=RESULTS / "mini_quality.json")
    args = parser.parse_args()
    result = measure(args.model or shipped_model(), args.prompts, args.seed, args.steps, args.guidance, args.sampler)
    for name in ("both_colours_right", "shape_right", "all_right"):
        print(f"{name:20} {result[name]:6.1%}")
    print(*[f"  miss: {miss}" for miss in result["misses"]], sep="\n")  # type: ignore[attr-defined]
    write(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
