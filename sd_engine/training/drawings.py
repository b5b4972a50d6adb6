"""The pictures that the shipped model learns from: simple shapes, drawn here, with captions that say what they show."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 35),
    "green": (40, 160, 60),
    "blue": (35, 75, 215),
    "yellow": (250, 220, 40),
    "orange": (250, 135, 20),
    "purple": (125, 45, 165),
    "pink": (250, 150, 190),
    "white": (250, 250, 250),
    "black": (15, 15, 18),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
SIZES: dict[str, float] = {"small": 0.19, "": 0.28, "large": 0.38}  # radius as a share of the shorter side
RELATIONS = ("left of", "right of", "above", "below")
SUPERSAMPLING = 3

Point = tuple[float, float]


def _polar(radius: float, degrees: float) -> Point:
    return radius * math.cos(math.radians(degrees)), radius * math.sin(math.radians(degrees))


def _heart(points: int = 48) -> list[Point]:
    """The well-known parametric heart, scaled to about a unit radius, pointing down (the y axis points down)."""
    turns = [2 * math.pi * i / points for i in range(points)]
    return [
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16 - 0.1,
        )
        for t in turns
    ]


_CROSS: list[Point] = [
    (-0.32, -1), (0.32, -1), (0.32, -0.32), (1, -0.32), (1, 0.32), (0.32, 0.32),
    (0.32, 1), (-0.32, 1), (-0.32, 0.32), (-1, 0.32), (-1, -0.32), (-0.32, -0.32),
]  # fmt: skip

OUTLINES: dict[str, list[Point]] = {
    "circle": [_polar(0.95, 360 * i / 48) for i in range(48)],
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [_polar(1.1, 90 + 120 * i + 180) for i in range(3)],
    "star": [_polar(1.1 if i % 2 == 0 else 0.45, -90 + 36 * i) for i in range(10)],
    "heart": _heart(),
    "cross": _CROSS,
}


@dataclass(frozen=True, slots=True)
class Thing:
    """One shape on the picture; centre and radius are shares of the sides."""

    colour: str
    shape: str
    size: str
    x: float
    y: float
    radius: float
    tilt: float  # degrees


@dataclass(frozen=True, slots=True)
class Scene:
    """What one picture shows, and the caption that says so."""

    caption: str
    background: str
    things: tuple[Thing, ...]


def _article(word: str, rng: random.Random) -> str:
    # People write "a orange star" too: both forms must mean the same to the model.
    return "an" if word[0] in "aeiou" and rng.random() < 0.5 else "a"


def _phrase(thing: Thing, rng: random.Random) -> str:
    words = " ".join(filter(None, (thing.size, thing.colour, thing.shape)))
    return f"{_article(words, rng)} {words}"


def _thing(rng: random.Random, colour: str, x: float, y: float, scale: float = 1.0) -> Thing:
    size = rng.choice(tuple(SIZES))
    radius = SIZES[size] * scale * rng.uniform(0.93, 1.07)
    wander = 0.5 * max(0.0, 0.47 - radius) * scale
    return Thing(
        colour=colour,
        shape=rng.choice(SHAPES),
        size=size,
        x=x + rng.uniform(-wander, wander),
        y=y + rng.uniform(-wander, wander),
        radius=radius,
        tilt=rng.uniform(-8, 8),
    )


def draw_scene_at_random(rng: random.Random, two_things: float = 0.15) -> Scene:
    """Invent a scene: mostly one thing on a background, sometimes (`two_things`) two that stand in a relation."""
    colours = rng.sample(tuple(COLOURS), 3)
    background = colours[0]
    behind = f"on {_article(background, rng)} {background} background"
    if rng.random() >= two_things:
        thing = _thing(rng, colours[1], 0.5, 0.5)
        return Scene(f"{_phrase(thing, rng)} {behind}", background, (thing,))
    relation = rng.choice(RELATIONS)
    horizontal = relation in ("left of", "right of")
    sign = -1 if relation in ("left of", "above") else 1
    places = [(0.5 + sign * s * 0.25, 0.5) if horizontal else (0.5, 0.5 + sign * s * 0.25) for s in (1, -1)]
    first, second = (_thing(rng, c, x, y, 0.6) for c, (x, y) in zip(colours[1:], places, strict=True))
    return Scene(f"{_phrase(first, rng)} {relation} {_phrase(second, rng)} {behind}", background, (first, second))


def _jittered(colour: str, rng: random.Random) -> tuple[int, int, int]:
    r, g, b = (min(255, max(0, channel + rng.randint(-6, 6))) for channel in COLOURS[colour])
    return r, g, b


def paint(scene: Scene, width: int, height: int, rng: random.Random) -> NDArray[np.uint8]:
    """Draw a scene, with smooth edges and a little jitter of its colours: uint8 [height, width, 3]."""
    big = (width * SUPERSAMPLING, height * SUPERSAMPLING)
    image = Image.new("RGB", big, _jittered(scene.background, rng))
    pen = ImageDraw.Draw(image)
    short = min(big)
    for thing in scene.things:
        cos, sin = math.cos(math.radians(thing.tilt)), math.sin(math.radians(thing.tilt))
        outline = [
            (
                thing.x * big[0] + thing.radius * short * (cos * x - sin * y),
                thing.y * big[1] + thing.radius * short * (sin * x + cos * y),
            )
            for x, y in OUTLINES[thing.shape]
        ]
        pen.polygon(outline, fill=_jittered(thing.colour, rng))
    return np.asarray(image.resize((width, height), Image.Resampling.BOX))


def vocabulary() -> list[str]:
    """Every word that a caption can hold, in a fixed order."""
    words = ["a", "an", "on", "of", "background", "left", "right", "above", "below", "small", "large"]
    return words + list(COLOURS) + list(SHAPES)
