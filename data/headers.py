"""Size and orientation of a picture from the first few kilobytes of its file.

Pillow reads a WEBP whole to open it and decodes a PNG to look for its orientation; imagesize knows the orientation
of neither. Hence JPEG, PNG and WEBP are read here, and Pillow answers for all others.
"""

from __future__ import annotations

import os
import struct
import warnings
from pathlib import Path
from typing import NamedTuple

from data.text import READ_FLAGS

# What Pillow may open: rasters only, no format that runs programs or guesses (EPS, PSD, FITS, ...).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
MAX_PIXELS = 178_956_970  # three bytes each make half a GiB: room for any camera, none for bombs
MAX_SIDE = 65_535
_MAX_SEGMENTS = 2_000
_BLOCK = 4_096
_TURNED = (5, 6, 7, 8)

# Pillow remarks on odd files, one by one; what matters of them is in the report. (Once for all: switching warnings off
# and on around each file is not safe where several threads read.)
warnings.filterwarnings("ignore", module=r"PIL\b")


class PictureError(Exception):
    """A picture that cannot be used; the text says why, as an end of a sentence that names the file."""


class Header(NamedTuple):
    """Size in pixels as it will be seen, and the EXIF orientation (1 to 8) that makes it so."""

    width: int
    height: int
    orientation: int


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header of the picture at `path`.

    Raises:
        PictureError: no picture, an unknown kind, a broken header, or too many pixels to be decoded safely.
    """
    try:
        descriptor = os.open(path, READ_FLAGS)
    except OSError as error:
        raise PictureError(f"cannot be opened: {error.strerror}") from error
    try:
        header = _checked(_sniff(_Blocks(descriptor), path))
    except (struct.error, IndexError) as error:
        raise PictureError("its header is broken or cut short") from error
    except OSError as error:
        raise PictureError(f"cannot be read: {error.strerror}") from error
    finally:
        os.close(descriptor)
    return header


class _Blocks:
    """A file read in small blocks where it is looked at."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._start = 0
        self._block = self._read(_BLOCK, 0)

    def at(self, offset: int, count: int) -> bytes:
        """The `count` bytes at `offset`; fewer at the end of the file."""
        inside = offset - self._start
        if inside < 0 or inside + count > len(self._block):
            self._start, inside = offset, 0
            self._block = self._read(max(count, _BLOCK), offset)
        return self._block[inside : inside + count]

    def _read(self, count: int, offset: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._descriptor, count, offset)
        os.lseek(self._descriptor, offset, os.SEEK_SET)
        return os.read(self._descriptor, count)


def _sniff(blocks: _Blocks, path: str | os.PathLike[str]) -> Header:
    start = blocks.at(0, 16)
    if not start:
        raise PictureError("the file is empty")
    if start[:3] == b"\xff\xd8\xff":
        return _jpeg(blocks)
    if start[:8] == b"\x89PNG\r\n\x1a\n":
        return _png(blocks)
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return _webp(blocks)
    return _by_pillow(path)


def _checked(header: Header) -> Header:
    width, height, orientation = header
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise PictureError(f"its header claims {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise PictureError(f"{width} x {height} pixels are more than the {MAX_PIXELS:,} that are decoded safely")
    if orientation in _TURNED:
        width, height = height, width
    return Header(width, height, orientation)


def _jpeg(blocks: _Blocks) -> Header:
    offset, orientation = 2, 1
    for _ in range(_MAX_SEGMENTS):
        marker, length = struct.unpack(">HH", blocks.at(offset, 4))
        if marker == 0xFFFF:  # fill byte
            offset += 1
            continue
        if marker < 0xFF01 or marker in (0xFFD9, 0xFFDA):
            break
        if marker == 0xFF01 or 0xFFD0 <= marker <= 0xFFD8:  # markers without a segment
            offset += 2
            continue
        if 0xFFC0 <= marker <= 0xFFCF and marker not in (0xFFC4, 0xFFC8, 0xFFCC):
            height, width = struct.unpack(">HH", blocks.at(offset + 5, 4))
            return Header(width, height, orientation)
        if marker == 0xFFE1 and orientation == 1 and blocks.at(offset + 4, 6) == b"Exif\0\0":
            orientation = _orientation(blocks.at(offset + 10, length - 8))
        offset += 2 + length
    raise PictureError("it is no JPEG picture behind its first bytes")


def _png(blocks: _Blocks) -> Header:
    length, name, width, height = struct.unpack(">I4sII", blocks.at(8, 16))
    if name != b"IHDR":
        raise PictureError("it is no PNG picture behind its first bytes")
    offset, orientation = 8, 1
    for _ in range(_MAX_SEGMENTS):
        head = blocks.at(offset, 8)
        if len(head) < 8:
            break
        length, name = struct.unpack(">I4s", head)
        if name in (b"IDAT", b"IEND"):
            break
        if name == b"eXIf":
            orientation = _orientation(blocks.at(offset + 8, min(length, 1 << 16)))
        offset += 12 + length
    return Header(width, height, orientation)


def _webp(blocks: _Blocks) -> Header:
    kind = blocks.at(12, 4)
    if kind == b"VP8X":
        flags, width, height = struct.unpack("<B3x3s3s", blocks.at(20, 10))
        size = int.from_bytes(width, "little") + 1, int.from_bytes(height, "little") + 1
        return Header(*size, _webp_orientation(blocks) if flags & 0x08 else 1)
    if kind == b"VP8L":
        bits = int.from_bytes(blocks.at(21, 4), "little")
        return Header((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, 1)
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", blocks.at(26, 4))
        return Header(width & 0x3FFF, height & 0x3FFF, 1)
    raise PictureError("it is no WEBP picture behind its first bytes")


def _webp_orientation(blocks: _Blocks) -> int:
    offset = 12
    for _ in range(_MAX_SEGMENTS):
        head = blocks.at(offset, 8)
        if len(head) < 8:
            break
        name, length = struct.unpack("<4sI", head)
        if name == b"EXIF":
            exif = blocks.at(offset + 8, min(length, 1 << 16))
            return _orientation(exif.removeprefix(b"Exif\0\0"))
        offset += 8 + length + length % 2
    return 1


def _orientation(exif: bytes) -> int:
    """The orientation tag of a TIFF structure; 1 when there is none or the structure is broken."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    try:
        if order is None:
            return 1
        (offset,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, offset)
        for place in range(offset + 2, offset + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", exif, place)
            if tag == 0x0112:
                return value if kind == 3 and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def _by_pillow(path: str | os.PathLike[str]) -> Header:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(Path(path), formats=FORMATS) as image:
            # Pillow turns a TIFF itself when it decodes it, and says its size as it will be.
            turned = 1 if image.format == "TIFF" else image.getexif().get(0x0112, 1)
            orientation = turned if turned in range(1, 9) else 1
            return Header(image.width, image.height, orientation)
    except UnidentifiedImageError as error:
        raise PictureError("it is no picture of a kind that is read (" + ", ".join(FORMATS) + ")") from error
    except Exception as error:  # a stranger's file: Pillow raises anything
        raise PictureError(f"its header is broken: {type(error).__name__}: {error}") from error
