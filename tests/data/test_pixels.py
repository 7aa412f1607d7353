"""Pixels: what part of a picture is used, how it is drawn, and that fast decoding is not seen."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.headers import PictureError, read_header
from data.item import Bucket, Caption, Item
from data.pixels import Crop, decode, draw_crop, load_pixels
from tests.data.corpus import HEIGHT, WIDTH, rgba, scene
from tests.photos import cut, photographs

SIDES = st.integers(1, 6000)


def save(path: Path, image: Image.Image) -> Item:
    image.save(path)
    return Item(path.name, str(path), *image.size, Caption(""))


@settings(deadline=None)
@given(width=SIDES, height=SIDES, bucket=st.builds(Bucket, SIDES, SIDES), seed=st.integers(0, 99))
def test_crop_lies_inside_and_has_the_shape(width: int, height: int, bucket: Bucket, seed: int) -> None:
    crop = draw_crop(width, height, bucket, rng=random.Random(seed), flip_p=0.5, crop_jitter=0.02)
    assert -1e-9 <= crop.left < crop.right <= 1 + 1e-9
    assert -1e-9 <= crop.top < crop.bottom <= 1 + 1e-9
    ratio = (crop.right - crop.left) * width / ((crop.bottom - crop.top) * height)
    assert math.isclose(ratio, bucket.width / bucket.height, rel_tol=1e-6)


@settings(deadline=None)
@given(width=st.integers(64, 70), height=st.integers(64, 70), seed=st.integers(0, 99))
def test_jitter_never_makes_an_image_too_small(width: int, height: int, seed: int) -> None:
    bucket = Bucket(64, 64)
    crop = draw_crop(width, height, bucket, rng=random.Random(seed), flip_p=0, crop_jitter=0.02)
    assert (crop.right - crop.left) * width >= bucket.width - 1e-6
    assert (crop.bottom - crop.top) * height >= bucket.height - 1e-6


def test_jitter_cuts_up_to_its_share_of_the_short_side() -> None:
    crops = [
        draw_crop(3000, 2000, Bucket(384, 256), rng=random.Random(seed), flip_p=0, crop_jitter=0.02)
        for seed in range(2000)
    ]
    # The aspect crop that follows takes from one pair of sides only: the other shows the jitter as it was drawn.
    tops = [crop.top * 2000 for crop in crops if crop.bottom - crop.top < 1 and crop.left * 3000 > 40]
    assert max(crop.top for crop in crops) * 2000 <= 40 + 60
    assert tops
    assert 0.98 < max(top / 40 for top in tops) <= 1.0
    assert draw_crop(3000, 2000, Bucket(384, 256), rng=random.Random(1), flip_p=0, crop_jitter=0.0)[:4] == (0, 0, 1, 1)


def test_offset_is_triangular_around_the_middle() -> None:
    wide = [
        draw_crop(2000, 1000, Bucket(512, 512), rng=random.Random(seed), flip_p=0, crop_jitter=0.0).left * 2
        for seed in range(4000)
    ]
    assert abs(np.mean(wide) - 0.5) < 3 * math.sqrt(1 / 24 / 4000)
    assert abs(np.var(wide) - 1 / 24) < 0.003  # a uniform place would have 1 / 12
    assert min(wide) < 0.05
    assert max(wide) > 0.95


def test_options_do_not_shift_each_others_draws() -> None:
    def crop(flip_p: float, crop_jitter: float, seed: int) -> Crop:
        return draw_crop(2000, 1000, Bucket(512, 512), rng=random.Random(seed), flip_p=flip_p, crop_jitter=crop_jitter)

    for seed in range(50):
        assert crop(0.0, 0.0, seed)[:4] == crop(1.0, 0.0, seed)[:4]
        assert crop(0.5, 0.0, seed).flip == crop(0.5, 0.02, seed).flip


def test_flip_share_and_mirror(tmp_path: Path) -> None:
    item = save(tmp_path / "a.png", Image.fromarray(scene()))
    bucket = Bucket(WIDTH, HEIGHT)
    flips = [draw_crop(96, 64, bucket, rng=random.Random(s), flip_p=0.25, crop_jitter=0).flip for s in range(4000)]
    assert abs(np.mean(flips) - 0.25) < 3 * math.sqrt(0.25 * 0.75 / 4000)
    plain = load_pixels(item, bucket, rng=random.Random(1), flip_p=0.0, crop_jitter=0.0)
    mirrored = load_pixels(item, bucket, rng=random.Random(1), flip_p=1.0, crop_jitter=0.0)
    assert torch.equal(mirrored, plain.flip(2))


def test_validation_takes_the_middle(tmp_path: Path) -> None:
    item = save(tmp_path / "a.png", Image.fromarray(scene()))
    pixels = load_pixels(item, Bucket(HEIGHT, HEIGHT), rng=None, flip_p=1.0, crop_jitter=0.02)
    assert torch.equal(pixels, torch.from_numpy(scene()[:, 16:80].copy()).permute(2, 0, 1))
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous()


def test_same_stream_same_pixels(tmp_path: Path) -> None:
    item = save(tmp_path / "a.jpg", photographs()["cat"][0])
    one, two, other = (
        load_pixels(item, Bucket(64, 128), rng=random.Random(seed), flip_p=0.5, crop_jitter=0.02) for seed in (4, 4, 5)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_background_is_the_option(tmp_path: Path) -> None:
    item = save(tmp_path / "a.png", rgba())
    pixels = load_pixels(item, Bucket(WIDTH, HEIGHT), rng=None, flip_p=0, crop_jitter=0, background=(0, 10, 20))
    assert pixels[:, 10, 40].tolist() == [0, 10, 20]


@pytest.mark.parametrize("orientation", [1, 6])
def test_scaled_decoding_cannot_be_seen(tmp_path: Path, orientation: int) -> None:
    """A large JPEG comes out as full decoding and the same resize would have it, at 45 dB or better."""
    large = cut(photographs()["temple"][0], (2000, 1500), 0.5)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.jpg"
    large.save(path, quality=95, exif=exif)
    header = read_header(path)
    item = Item("a.jpg", str(path), header.width, header.height, Caption(""))
    bucket = Bucket(256, 192) if orientation == 1 else Bucket(192, 256)
    crop = draw_crop(item.width, item.height, bucket, rng=None, flip_p=0, crop_jitter=0)
    drafted, _ = decode(item.path, header, crop, bucket)
    assert drafted.width <= header.width / 2
    with Image.open(path) as image:
        upright = (
            image.convert("RGB") if orientation == 1 else image.convert("RGB").transpose(Image.Transpose.ROTATE_270)
        )
    full = torch.from_numpy(np.array(upright)).permute(2, 0, 1)[None]
    ideal = torch.nn.functional.interpolate(full, bucket[::-1], mode="bicubic", antialias=True)[0]
    pixels = load_pixels(item, bucket, rng=None, flip_p=0, crop_jitter=0)
    error = (pixels.float() - ideal.float()).square().mean().item()
    assert 10 * math.log10(255**2 / error) > 45


def test_small_pictures_grow(tmp_path: Path) -> None:
    item = save(tmp_path / "a.png", Image.new("RGB", (1, 1), (9, 8, 7)))
    pixels = load_pixels(item, Bucket(64, 128), rng=random.Random(1), flip_p=0, crop_jitter=0.02)
    assert pixels.shape == (3, 128, 64)
    assert pixels[:, 5, 5].tolist() == [9, 8, 7]


def test_a_picture_that_went_away_has_a_reason(tmp_path: Path) -> None:
    item = Item("gone.jpg", str(tmp_path / "gone.jpg"), 64, 64, Caption(""))
    with pytest.raises(PictureError, match="No such file"):
        load_pixels(item, Bucket(64, 64), rng=None, flip_p=0, crop_jitter=0)
