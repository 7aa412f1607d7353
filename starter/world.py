"""The small world: one coloured shape on a coloured background, drawn and described."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

COLOURS: dict[str, Colour] = {
    "red": (215, 40, 45),
    "orange": (245, 140, 30),
    "yellow": (248, 222, 50),
    "green": (45, 165, 65),
    "blue": (45, 85, 215),
    "purple": (130, 50, 165),
}
BACKGROUNDS: dict[str, Colour] = {
    "grey": (130, 130, 130),
    "pink": (235, 165, 190),
    "cyan": (120, 205, 215),
    "brown": (115, 80, 60),
    "beige": (215, 195, 155),
}
# The base never drew these: the extremes that ordinary noise cannot reach (`zero_frequency_noise_ratio`).
EXTREMES: dict[str, Colour] = {"black": (8, 8, 8), "white": (248, 248, 248)}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
ZORP = "zorp"  # an hourglass; the base has met neither the word nor the shape
# The three buckets nearest to a square that resolution 64 and bucket_step 16 give: 4:3 does not exist there.
SIZES = ((64, 64), (80, 48), (48, 80))

_SUPERSAMPLING = 4
_TEMPLATES = (
    "a {colour} {shape} on a {background} background",
    "a {colour} {shape} on a {background} background",
    "a {colour} {shape}, {background} background",
    "a picture of a {colour} {shape} on {background}",
    "a drawing of a {colour} {shape} against a {background} background",
)


@dataclass(frozen=True, slots=True)
class Scene:
    """What is drawn where: `centre`, `radius` and `size` (width, height) in pixels, `tilt` in degrees."""

    shape: str
    colour: str
    background: str
    size: tuple[int, int]
    centre: Point
    radius: float
    tilt: float


def random_scene(
    rng: random.Random,
    *,
    shapes: Sequence[str] = SHAPES,
    colours: Sequence[str] = tuple(COLOURS),
    backgrounds: Sequence[str] = tuple(BACKGROUNDS),
    sizes: Sequence[tuple[int, int]] = SIZES,
) -> Scene:
    """One scene with every word and number drawn from `rng`; the shape lies within the picture."""
    width, height = rng.choice(sizes)
    radius = rng.uniform(0.30, 0.38) * min(width, height)
    x_room, y_room = (max(0.0, min(0.16 * side, side / 2 - radius - 2)) for side in (width, height))
    return Scene(
        shape=rng.choice(shapes),
        colour=rng.choice(colours),
        background=rng.choice(backgrounds),
        size=(width, height),
        centre=(width / 2 + rng.uniform(-x_room, x_room), height / 2 + rng.uniform(-y_room, y_room)),
        radius=radius,
        tilt=rng.uniform(-8, 8),
    )


def caption(scene: Scene, rng: random.Random) -> str:
    """The scene in words, in one of a few phrasings."""
    text = rng.choice(_TEMPLATES).format(colour=scene.colour, shape=scene.shape, background=scene.background)
    return text.replace("a orange", "an orange")


def plain_caption(colour: str, shape: str, background: str) -> str:
    """The commonest phrasing, as the sampled prompts of the figures use it."""
    return _TEMPLATES[0].format(colour=colour, shape=shape, background=background).replace("a orange", "an orange")


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """The scene as an RGB picture of `scene.size`, antialiased; `rng` shifts both colours by a few levels."""
    shade = _shaded(COLOURS[scene.colour], rng)
    ground = _shaded((BACKGROUNDS | EXTREMES)[scene.background], rng)
    width, height = scene.size
    picture = Image.new("RGB", (width * _SUPERSAMPLING, height * _SUPERSAMPLING), ground)
    pen = ImageDraw.Draw(picture)
    for outline, is_hole in outlines(scene.shape):
        pen.polygon(_placed(outline, scene), fill=ground if is_hole else shade)
    return picture.resize((width, height), Image.Resampling.BOX)


def doodle(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """One to three random outlines in any colours: the autoencoder's world is wider than the captions'."""
    width, height = size
    picture = Image.new("RGB", (width * _SUPERSAMPLING, height * _SUPERSAMPLING), _any_colour(rng))
    pen = ImageDraw.Draw(picture)
    for _ in range(rng.randint(1, 3)):
        corners = rng.randint(3, 9)
        angles = sorted(rng.uniform(0, math.tau) for _ in range(corners))
        outline = [(math.cos(a) * r, math.sin(a) * r) for a in angles for r in (rng.uniform(0.3, 1.0),)]
        radius = rng.uniform(0.2, 0.5) * min(size)
        centre = (rng.uniform(0.2, 0.8) * width, rng.uniform(0.2, 0.8) * height)
        pen.polygon(_placed(outline, Scene("", "", "", size, centre, radius, 0.0)), fill=_any_colour(rng))
    return picture.resize(size, Image.Resampling.BOX)


def outlines(shape: str) -> list[tuple[list[Point], bool]]:
    """The polygons of `shape` within the unit circle, y downwards, each with whether it is a hole."""
    if shape == "ring":
        return [(_regular(48, 1.0), False), (_regular(48, 0.52), True)]
    return [(_outline(shape), False)]


def _outline(shape: str) -> list[Point]:
    match shape:
        case "circle":
            return _regular(48, 0.92)
        case "square":
            return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
        case "triangle":
            return [(0.0, -0.95), (0.95, 0.75), (-0.95, 0.75)]
        case "star":
            return _regular(10, 1.05, 0.46)
        case "cross":
            a, b = 0.3, 0.98
            return [
                (-a, -b),
                (a, -b),
                (a, -a),
                (b, -a),
                (b, a),
                (a, a),
                (a, b),
                (-a, b),
                (-a, a),
                (-b, a),
                (-b, -a),
                (-a, -a),
            ]
        case "zorp":
            return [(-0.82, -0.95), (0.82, -0.95), (0.16, 0.0), (0.82, 0.95), (-0.82, 0.95), (-0.16, 0.0)]
    raise KeyError(shape)


def _regular(corners: int, outer: float, inner: float | None = None) -> list[Point]:
    radii = (outer, outer if inner is None else inner)
    angles = [math.tau * i / corners - math.pi / 2 for i in range(corners)]
    return [(math.cos(angle) * radii[i % 2], math.sin(angle) * radii[i % 2]) for i, angle in enumerate(angles)]


def _placed(outline: Sequence[Point], scene: Scene) -> list[Point]:
    cos, sin = math.cos(math.radians(scene.tilt)), math.sin(math.radians(scene.tilt))
    scale = scene.radius * _SUPERSAMPLING
    left, top = scene.centre[0] * _SUPERSAMPLING, scene.centre[1] * _SUPERSAMPLING
    return [(left + scale * (x * cos - y * sin), top + scale * (x * sin + y * cos)) for x, y in outline]


def _shaded(colour: Colour, rng: random.Random) -> Colour:
    red, green, blue = (max(0, min(255, level + rng.randint(-6, 6))) for level in colour)
    return red, green, blue


def _any_colour(rng: random.Random) -> Colour:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)
