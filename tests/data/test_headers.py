"""Headers: as Pillow has them, in a few kilobytes, and nothing but a reason for broken ones."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data.headers import MAX_PIXELS, PictureError, read_header
from tests.data.corpus import exif, jpeg, png, png_header, rgb
from tests.photos import make_photo_folder


def test_as_pillow_has_it(tmp_path: Path) -> None:
    for path in make_photo_folder(tmp_path):
        with Image.open(path) as image:
            assert read_header(path) == (*ImageOps.exif_transpose(image).size, 1)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF"])
@pytest.mark.parametrize("size", [(1, 1), (300, 7), (17, 2000)])
def test_every_form(tmp_path: Path, form: str, size: tuple[int, int]) -> None:
    path = tmp_path / "picture"
    Image.new("RGB", size, (1, 2, 3)).save(path, form)
    assert read_header(path)[:2] == size


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_webp_layouts(tmp_path: Path, mode: str, lossless: bool) -> None:
    path = tmp_path / "a.webp"
    Image.new(mode, (321, 123)).save(path, lossless=lossless)
    assert read_header(path) == (321, 123, 1)
    Image.new(mode, (321, 123)).save(path, lossless=lossless, exif=exif(8))
    assert read_header(path) == (123, 321, 8)


def test_exif_behind_a_large_segment(tmp_path: Path) -> None:
    data = jpeg(exif=exif(6))
    path = tmp_path / "a.jpg"
    path.write_bytes(data[:2] + b"\xff\xe2" + struct.pack(">H", 60_002) + bytes(60_000) + data[2:])
    assert read_header(path) == (64, 96, 6)


def test_exif_of_either_byte_order(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    for order, mark in (("<", b"II*\0"), (">", b"MM\0*")):
        tiff = mark + struct.pack(order + "I", 8) + struct.pack(order + "HHHIHHI", 1, 0x0112, 3, 1, 3, 0, 0)
        rgb().save(path, exif=b"Exif\0\0" + tiff)
        assert read_header(path).orientation == 3


def test_only_the_front_of_a_large_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png())
    with path.open("ab") as file:
        file.truncate(1 << 40)
    assert read_header(path)[:2] == (96, 64)


def test_size_limits(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png_header(16_000, MAX_PIXELS // 16_000))
    assert read_header(path).width == 16_000
    path.write_bytes(png_header(16_000, MAX_PIXELS // 16_000 + 1))
    with pytest.raises(PictureError, match="decoded safely"):
        read_header(path)


def test_missing_and_folder(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match="cannot be opened"):
        read_header(tmp_path / "no.jpg")
    with pytest.raises(PictureError, match="cannot be"):
        read_header(tmp_path)


SEEDS = [jpeg(exif=exif(6))[:600], png(exif=exif(6))[:200], b"RIFF\x40\0\0\0WEBPVP8X\x0a\0\0\0\x08" + bytes(60)]


CHANGES = st.lists(st.tuples(st.integers(0, 599), st.binary(min_size=1, max_size=4)), max_size=6)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.sampled_from(SEEDS), length=st.integers(0, 600), changes=CHANGES)
def test_broken_headers_give_a_size_or_a_reason(
    tmp_path: Path, seed: bytes, length: int, changes: list[tuple[int, bytes]]
) -> None:
    data = bytearray(seed)
    for place, change in changes:
        data[place : place + len(change)] = change
    path = tmp_path / "broken"
    path.write_bytes(data[:length])
    with contextlib.suppress(PictureError):
        header = read_header(path)
        assert header.width > 0
        assert header.height > 0
        assert header.width * header.height <= MAX_PIXELS
