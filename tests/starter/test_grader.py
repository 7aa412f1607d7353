import random

import numpy as np
from PIL import Image, ImageFilter

from starter.grader import grade, is_right
from starter.world import BACKGROUNDS, EXTREMES, SHAPES, SIZES, ZORP, doodle, draw, random_scene
from utils.seeding import stream

EVERY_SHAPE = (*SHAPES, ZORP)


def test_unseen_drawings_are_graded_right() -> None:
    rng = stream(2024, "unseen drawings")
    wrong = 0
    for _ in range(600):
        scene = random_scene(rng, shapes=EVERY_SHAPE, backgrounds=tuple(BACKGROUNDS | EXTREMES))
        found = grade(draw(scene, rng))
        wrong += (found.shape, found.colour, found.background) != (scene.shape, scene.colour, scene.background)
    assert wrong / 600 <= 0.02


def test_slightly_blurred_and_noisy_drawings_are_graded_right() -> None:
    rng = stream(2024, "worn drawings")
    dust = np.random.default_rng(0)
    wrong = 0
    for _ in range(200):
        scene = random_scene(rng, shapes=EVERY_SHAPE)
        blurred = np.asarray(draw(scene, rng).filter(ImageFilter.GaussianBlur(0.8)), dtype=np.float32)
        worn = Image.fromarray((blurred + dust.normal(0, 6, blurred.shape)).clip(0, 255).astype(np.uint8))
        wrong += not is_right(worn, shape=scene.shape, colour=scene.colour)
    assert wrong / 200 <= 0.02


def test_mush_has_no_name() -> None:
    dust = np.random.default_rng(0)
    for _ in range(100):
        blobs = Image.fromarray(dust.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        assert grade(blobs.resize((64, 64), Image.Resampling.BICUBIC)).shape is None
    flat = grade(Image.new("RGB", (80, 48), (130, 130, 130)))
    assert (flat.shape, flat.colour, flat.background) == (None, None, "grey")


def test_doodles_are_seldom_taken_for_shapes() -> None:
    rng = random.Random(4)
    named = sum(grade(doodle(rng, SIZES[i % 3])).shape is not None for i in range(200))
    assert named <= 24


def test_the_wrong_colour_or_shape_is_wrong() -> None:
    rng = random.Random(5)
    picture = draw(random_scene(rng, shapes=("star",), colours=("red",)), rng)
    assert is_right(picture, shape="star", colour="red")
    assert not is_right(picture, shape="star", colour="orange")
    assert not is_right(picture, shape="cross", colour="red")
