"""A captioned folder of real photographs, cut from those that scikit-image and scikit-learn carry."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

# name, package, file, caption
_SOURCES = (
    ("astronaut", "skimage", "data/astronaut.png", "an astronaut, portrait, orange suit, smiling"),
    ("cat", "skimage", "data/chelsea.png", "a cat, close-up, whiskers"),
    ("coffee", "skimage", "data/coffee.png", "a cup of coffee, saucer, spoon, wooden table"),
    ("rocket", "skimage", "data/rocket.jpg", "a rocket on its pad, night, floodlights"),
    ("galaxies", "skimage", "data/hubble_deep_field.jpg", "distant galaxies, black sky"),
    ("temple", "sklearn", "datasets/images/china.jpg", "a temple, red columns, blue sky"),
    ("flower", "sklearn", "datasets/images/flower.jpg", "a flower, orange petals, green leaves"),
)
# suffix, size of the whole cut, place of the cut from 0 to 1
_CUTS = ((".jpg", (192, 128), 0.5), (".png", (128, 192), 0.4), (".webp", (160, 160), 0.6))


@lru_cache(maxsize=1)
def photographs() -> dict[str, tuple[Image.Image, str]]:
    """The pictures (RGB, at most 512 pixels wide) with their captions, by name."""
    found = {}
    for name, package, file, caption in _SOURCES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        with Image.open(Path(spec.origin).parent / file) as image:
            small = image.convert("RGB")
            small.thumbnail((512, 512))
            found[name] = (small, caption)
    return found


def cut(image: Image.Image, size: tuple[int, int], place: float) -> Image.Image:
    """The largest part of `image` in the shape of `size`, made that size; `place` from 0 to 1 says which."""
    scale = min(image.width / size[0], image.height / size[1])
    width, height = size[0] * scale, size[1] * scale
    left, top = (image.width - width) * place, (image.height - height) * place
    return image.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))


def make_photo_folder(folder: Path) -> list[Path]:
    """The paths of the 21 pictures written to `folder`: seven photographs in three shapes and kinds of file.

    Landscape JPEG, portrait PNG and square WEBP, each with a `.txt` beside it; the same bytes at every call.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (image, caption) in photographs().items():
        for suffix, size, place in _CUTS:
            path = folder / f"{name}_{size[0]}x{size[1]}{suffix}"
            options: dict[str, dict[str, Any]] = {
                ".jpg": {"quality": 90},
                ".png": {"compress_level": 1},
                ".webp": {"quality": 90, "method": 0},
            }
            cut(image, size, place).save(path, **options[suffix])
            path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
            written.append(path)
    return written
