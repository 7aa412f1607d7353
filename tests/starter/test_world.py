import random

from starter.world import BACKGROUNDS, COLOURS, SHAPES, SIZES, ZORP, caption, doodle, draw, random_scene
from utils.seeding import stream


def test_a_drawing_is_a_function_of_its_stream() -> None:
    def once(seed: int) -> tuple[str, bytes]:
        rng = stream(seed, "test world")
        scene = random_scene(rng)
        return caption(scene, rng), draw(scene, rng).tobytes()

    assert once(1) == once(1)
    assert once(1)[1] != once(2)[1]


def test_captions_name_what_is_drawn_and_never_the_new_word() -> None:
    rng = random.Random(0)
    seen = set()
    for _ in range(300):
        scene = random_scene(rng)
        words = caption(scene, rng).replace(",", "").split()
        assert {scene.colour, scene.shape, scene.background} <= set(words)
        assert "a orange" not in caption(scene, rng)
        seen |= set(words)
    assert ZORP not in seen
    assert set(SHAPES) | set(COLOURS) | set(BACKGROUNDS) <= seen


def test_shapes_lie_within_the_picture() -> None:
    rng = random.Random(1)
    for _ in range(200):
        scene = random_scene(rng, shapes=(*SHAPES, ZORP))
        array = draw(scene, rng)
        width, height = scene.size
        frame = {array.getpixel((x, y)) for x in range(width) for y in (0, height - 1)}
        frame |= {array.getpixel((x, y)) for y in range(height) for x in (0, width - 1)}
        assert len(frame) == 1, scene


def test_every_size_survives_the_networks() -> None:
    for width, height in SIZES:
        assert width % 16 == height % 16 == 0
        assert width * height <= 64 * 64


def test_doodles_have_the_size_asked_for() -> None:
    assert doodle(random.Random(0), (80, 48)).size == (80, 48)
