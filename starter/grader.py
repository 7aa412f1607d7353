"""The judge of pictures of the small world: which shape, in which colour, on which background, or none."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from starter.world import BACKGROUNDS, COLOURS, EXTREMES, SHAPES, ZORP, Colour, Scene, draw

Plane = NDArray[np.float32]

GRID = 24  # a normalised outline is GRID x GRID samples
REACH = 2.1  # and reaches this many standard deviations of the shape's own pixels from its centre
TILTS = (-10, -5, 0, 5, 10)
# Drawings overlap with their template by 0.89 and more. The autoencoder rounds corners: 0.73 and more is left after it.
LEAST_OVERLAP = 0.70
LEAST_LEAD = 0.04  # of the best shape over the next one: what lies between two shapes is neither
COLOUR_REACH = 60.0  # Euclidean distance in 8-bit RGB beyond which a colour has no name
FLAT_SHARE = 0.8  # of the frame must be close to its median colour: a shape may touch an edge
EDGE_CONTRAST = 45.0
AREAS = (0.04, 0.55)  # of the picture


@dataclass(frozen=True, slots=True)
class Grade:
    """What a picture shows, `None` where that has no name; `overlap` with the nearest template, 0 .. 1."""

    shape: str | None
    colour: str | None
    background: str | None
    overlap: float


def grade(picture: Image.Image) -> Grade:
    """The grade of an RGB picture of any size, by its pixels alone; the same picture always gets the same grade."""
    array = np.asarray(picture.convert("RGB"), dtype=np.float32)
    ground = _frame_colour(array)
    background = None if ground is None else _nearest(ground, BACKGROUNDS | EXTREMES)
    seen = _outline(array)
    if seen is None:
        return Grade(None, None, background, 0.0)
    outline, ink = seen
    overlaps = _overlaps(outline)
    first, second = sorted(overlaps, key=lambda name: -overlaps[name])[:2]
    named = overlaps[first] >= LEAST_OVERLAP and overlaps[first] - overlaps[second] >= LEAST_LEAD
    return Grade(first if named else None, _nearest(ink, COLOURS), background, overlaps[first])


def is_right(picture: Image.Image, *, shape: str, colour: str) -> bool:
    """Whether shape and colour are as asked: the measure of docs/learning.md."""
    found = grade(picture)
    return found.shape == shape and found.colour == colour


def likeness(picture: Image.Image, *, shape: str, colour: str) -> float:
    """How much the picture's outline overlaps with `shape`, 0 .. 1; 0 where the colour is another or nothing is drawn.

    It tells half-learned from not learned, where `is_right` still says no to both.
    """
    seen = _outline(np.asarray(picture.convert("RGB"), dtype=np.float32))
    if seen is None or _nearest(seen[1], COLOURS) != colour:
        return 0.0
    return _overlaps(seen[0])[shape]


def _outline(array: Plane) -> tuple[Plane, Plane] | None:
    """The normalised outline of what is drawn and its colour, or None."""
    ground = _frame_colour(array)
    if ground is None:
        return None
    cover, ink = _cover(array, ground)
    if cover is None or not AREAS[0] < float(cover.mean()) < AREAS[1]:
        return None
    return _normalised(cover), ink


def _frame_colour(array: Plane) -> Plane | None:
    """The median colour of the outermost pixels, or None if they are of many colours."""
    frame = np.concatenate([array[0], array[-1], array[1:-1, 0], array[1:-1, -1]])
    colour = np.median(frame, axis=0).astype(np.float32)
    close = np.linalg.norm(frame - colour, axis=1) < EDGE_CONTRAST
    return colour if float(close.mean()) >= FLAT_SHARE else None


def _cover(array: Plane, ground: Plane) -> tuple[Plane | None, Plane]:
    """How much of each pixel the shape covers (0 .. 1), and the shape's colour."""
    distance = np.linalg.norm(array - ground, axis=2)
    strong = distance >= max(EDGE_CONTRAST, 0.75 * float(np.quantile(distance, 0.97)))
    if int(strong.sum()) < 12:
        return None, ground
    ink = np.median(array[strong], axis=0).astype(np.float32)
    way = ink - ground
    cover = ((array - ground) @ way) / float(way @ way)
    return np.clip(cover, 0.0, 1.0).astype(np.float32), ink


def _normalised(cover: Plane) -> Plane:
    """`cover` resampled about its centre, its standard deviation as the unit: free of place and size, not of tilt."""
    solid = np.where(cover > 0.3, cover, 0.0)
    rows, columns = np.mgrid[: cover.shape[0], : cover.shape[1]].astype(np.float32)
    mass = float(solid.sum())
    y, x = float((solid * rows).sum()) / mass, float((solid * columns).sum()) / mass
    spread = np.sqrt(float((solid * ((rows - y) ** 2 + (columns - x) ** 2)).sum()) / mass / 2)
    steps = np.linspace(-REACH, REACH, GRID, dtype=np.float32) * spread
    return _sampled(cover, y + steps[:, None], x + steps[None, :])


def _sampled(plane: Plane, rows: Plane, columns: Plane) -> Plane:
    """Bilinear samples of `plane`, which is zero outside."""
    padded = np.pad(plane, 1)
    rows = np.clip(rows + 1, 0, padded.shape[0] - 1.001)
    columns = np.clip(columns + 1, 0, padded.shape[1] - 1.001)
    top, left = rows.astype(int), columns.astype(int)
    down, right = rows - top, columns - left
    upper = padded[top, left] * (1 - right) + padded[top, left + 1] * right
    lower = padded[top + 1, left] * (1 - right) + padded[top + 1, left + 1] * right
    return np.asarray(upper * (1 - down) + lower * down, dtype=np.float32)


def _nearest(colour: Plane, palette: dict[str, Colour]) -> str | None:
    distances = {name: float(np.linalg.norm(colour - np.array(level))) for name, level in palette.items()}
    best = min(distances, key=lambda name: distances[name])
    return best if distances[best] <= COLOUR_REACH else None


def _overlaps(outline: Plane) -> dict[str, float]:
    """Intersection over union with the nearest template of every shape."""
    names, templates = _templates()
    overlaps = np.minimum(outline, templates).sum(axis=(1, 2)) / np.maximum(outline, templates).sum(axis=(1, 2))
    best: dict[str, float] = {}
    for name, overlap in zip(names, overlaps, strict=True):
        best[name] = max(best.get(name, 0.0), float(overlap))
    return best


@cache
def _templates() -> tuple[list[str], Plane]:
    """Every shape, large and in the middle, at a few tilts, seen as a graded picture is seen."""
    names: list[str] = []
    planes: list[Plane] = []
    for shape in (*SHAPES, ZORP):
        for tilt in TILTS:
            scene = Scene(shape, "blue", "grey", (64, 64), (32.0, 32.0), 21.0, float(tilt))
            array = np.asarray(draw(scene, random.Random(0)), dtype=np.float32)
            cover, _ = _cover(array, array[0, 0])
            assert cover is not None
            names.append(shape)
            planes.append(_normalised(cover))
    return names, np.stack(planes)
