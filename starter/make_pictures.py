"""The starter's captioned folder from nothing: `python -m starter.make_pictures` draws `starter/pictures`."""

from __future__ import annotations

import argparse
import itertools
import random
from pathlib import Path
from typing import Any

from PIL import Image

from starter.world import BACKGROUNDS, COLOURS, SHAPES, SIZES, ZORP, Scene, draw, plain_caption, random_scene
from utils.seeding import stream

# The colours and grounds that the new shape is shown in. What the others look like on it is left to be asked.
TAUGHT_COLOURS = ("red", "yellow", "green", "purple")
TAUGHT_BACKGROUNDS = ("grey", "pink", "brown")
TAUGHT = tuple(itertools.product(TAUGHT_COLOURS, TAUGHT_BACKGROUNDS))
EACH = 4
EACH_OLD = 5
ENLARGED = 4
FORMATS = ("png", "png", "jpg", "webp")
SAVING: dict[str, dict[str, Any]] = {
    "png": {"optimize": True},
    "jpg": {"quality": 92, "subsampling": 0},
    "webp": {"lossless": True},
}


def make_pictures(folder: Path, *, seed: int = 0) -> int:
    """Write the folder and return how many pictures it holds; the same `seed` gives the same pictures."""
    new = _draw_new(folder / "zorps", seed)
    old = _draw_old(folder / "known", seed)
    return new + old


def _draw_new(folder: Path, seed: int) -> int:
    """Every taught pair of colour and ground `EACH` times; captions as sidecars of three kinds."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = stream(seed, "pictures", "new")
    places = itertools.cycle(SIZES)
    for number, (colour, ground) in enumerate(TAUGHT * EACH):
        scene = random_scene(rng, shapes=(ZORP,), colours=(colour,), backgrounds=(ground,), sizes=(next(places),))
        name = f"zorp-{number:02}"
        _save(scene, rng, folder, name, FORMATS[number % len(FORMATS)])
        if number % 3 == 2:
            _write(
                folder / f"{name}.yaml",
                f"main_prompt: {_article(colour)} {colour} {ZORP}\ntags:\n  - {ground} background\n",
            )
        else:
            _write(folder / f"{name}.txt", plain_caption(colour, ZORP, ground) + "\n")
    _write(folder / "local.yaml", "# A mirrored zorp is a zorp.\nflip_p: 0.5\n")
    return len(TAUGHT) * EACH


def _draw_old(folder: Path, seed: int) -> int:
    """What the base knows already, so that it does not forget it: each shape five times, captioned by its file name."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = stream(seed, "pictures", "old")
    places = itertools.cycle(SIZES)
    count = 0
    for shape in SHAPES:
        colours, grounds = rng.sample(list(COLOURS), EACH_OLD), rng.sample(list(BACKGROUNDS), EACH_OLD)
        for colour, ground in zip(colours, grounds, strict=True):
            scene = random_scene(rng, shapes=(shape,), colours=(colour,), backgrounds=(ground,), sizes=(next(places),))
            _save(
                scene, rng, folder, f"{plain_caption(colour, shape, ground)}_{count:02}", FORMATS[count % len(FORMATS)]
            )
            count += 1
    _write(folder / "multiply.txt", "0.8\n")
    return count


def _save(scene: Scene, rng: random.Random, folder: Path, name: str, kind: str) -> None:
    """Draw the scene `ENLARGED` times larger than it will be trained, as pictures from elsewhere are."""
    width, height = scene.size
    large = Scene(
        shape=scene.shape,
        colour=scene.colour,
        background=scene.background,
        size=(width * ENLARGED, height * ENLARGED),
        centre=(scene.centre[0] * ENLARGED, scene.centre[1] * ENLARGED),
        radius=scene.radius * ENLARGED,
        tilt=scene.tilt,
    )
    picture: Image.Image = draw(large, rng)
    picture.save(folder / f"{name}.{kind}", **SAVING[kind])


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("starter/pictures"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(f"{make_pictures(arguments.out, seed=arguments.seed)} pictures in {arguments.out}")


if __name__ == "__main__":
    main()
