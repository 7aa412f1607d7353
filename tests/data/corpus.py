"""Pictures of all kinds, good, odd and broken, each with what must become of it."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

WIDTH, HEIGHT = 96, 64
Array = np.ndarray[Any, Any]


def scene() -> Array:
    """A smooth picture (H, W, 3) in which every turn, flip and swap of colours shows."""
    x, y = np.meshgrid(np.linspace(0, 1, WIDTH), np.linspace(0, 1, HEIGHT))
    return np.rint(np.stack([40 + 180 * x, 40 + 180 * y, 220 - 90 * x - 90 * y], axis=-1)).astype(np.uint8)


def grey() -> Array:
    return scene()[..., 0]


def three(values: Array) -> Array:
    return np.repeat(values[..., None], 3, axis=-1)


@dataclass(frozen=True)
class Kind:
    """A kind of file. `pixels` and `tolerance` (mean absolute difference) or `reason` say what must come out.

    `late`: the header looks good; only decoding finds out.
    """

    name: str
    write: Callable[[Path], None]
    pixels: Array | None = None
    tolerance: float = 0.0
    reason: str = ""
    late: bool = False


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    target = io.BytesIO()
    image.save(target, form, **options)
    return target.getvalue()


def rgb() -> Image.Image:
    return Image.fromarray(scene())


def jpeg(**options: Any) -> bytes:
    return encoded(rgb(), "JPEG", **{"quality": 95, "subsampling": 0, **options})


def png(**options: Any) -> bytes:
    return encoded(rgb(), "PNG", **options)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_header(width: int, height: int) -> bytes:
    content = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", content) + body + chunk(b"IEND", b"")


def exif(orientation: int) -> bytes:
    data = Image.Exif()
    data[0x0112] = orientation
    return data.tobytes()


STORED: dict[int, Callable[[Array], Array]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


def stored(orientation: int) -> Image.Image:
    """The scene as a camera stores it that notes this orientation: each turn is undone by its tag."""
    return Image.fromarray(np.ascontiguousarray(STORED[orientation](scene())))


def alpha() -> Array:
    """Opaque on the left, transparent in the middle, half on the right."""
    values = np.full((HEIGHT, WIDTH), 255, np.uint8)
    values[:, 32:64] = 0
    values[:, 64:] = 128
    return values


def over_white(colours: Array, opacity: Array) -> Array:
    share = opacity[..., None].astype(float) / 255
    return np.rint(colours * share + 255 * (1 - share)).astype(np.uint8)


def rgba() -> Image.Image:
    return Image.fromarray(np.dstack([scene(), alpha()]))


def la() -> Image.Image:
    return Image.fromarray(np.dstack([grey(), alpha()]), "LA")


def palette() -> Image.Image:
    """Four colours, in four stripes."""
    image = Image.new("P", (WIDTH, HEIGHT))
    image.putpalette([255, 0, 0, 0, 200, 0, 0, 0, 255, 90, 90, 90])
    image.putdata([x * 4 // WIDTH for _ in range(HEIGHT) for x in range(WIDTH)])
    return image


def stripes(*colours: tuple[int, int, int]) -> Array:
    wide = np.repeat(np.array(colours, np.uint8), WIDTH // len(colours), axis=0)
    return np.repeat(wide[None], HEIGHT, axis=0)


def swapped_profile() -> bytes:
    """An RGB profile whose red and green primaries have changed places: nobody can overlook that it was applied."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    data = data.replace(b"s\0R\0G\0B", b"s\0w\0a\0p").replace(b"sRGB", b"swap")
    count = struct.unpack_from(">I", data, 128)[0]
    names = {bytes(data[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
    red, green = names[b"rXYZ"], names[b"gXYZ"]
    data[red + 4 : red + 12], data[green + 4 : green + 12] = data[green + 4 : green + 12], data[red + 4 : red + 12]
    return bytes(data)


def sixteen(image_format: str) -> bytes:
    return encoded(Image.fromarray(grey().astype(np.uint16) * 257), image_format)


def file(content: Callable[[], bytes] | bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content if isinstance(content, bytes) else content())

    return write


def saved(make: Callable[[], Image.Image], form: str, **options: Any) -> Callable[[Path], None]:
    return file(lambda: encoded(make(), form, **options))


def _animated(form: str) -> bytes:
    first, second = Image.fromarray(stripes((255, 0, 0), (0, 0, 255))), Image.new("RGB", (WIDTH, HEIGHT), (0, 99, 0))
    return encoded(first, form, save_all=True, append_images=[second], **({"lossless": True} if form == "WEBP" else {}))


def _cmyk() -> Image.Image:
    return rgb().convert("CMYK")


def _turned(number: int, form: str, **options: Any) -> Callable[[Path], None]:
    return file(lambda: encoded(stored(number), form, exif=exif(number), **options))


def _oriented() -> list[Kind]:
    return [
        *(
            Kind(f"orientation{number}.jpg", _turned(number, "JPEG", quality=95, subsampling=0), scene(), 1.5)
            for number in range(1, 9)
        ),
        Kind("orientation6.png", _turned(6, "PNG"), scene()),
        Kind("orientation6.webp", _turned(6, "WEBP", lossless=True, exact=True), scene()),
        Kind("orientation6.avif", _turned(6, "AVIF", quality=95, speed=10), scene(), 2.0),
        Kind("orientation6.tif", saved(lambda: stored(6), "TIFF", tiffinfo={274: 6}), scene()),
        Kind("orientation99.jpg", file(lambda: jpeg(exif=exif(99))), scene(), 1.5),
    ]


GOOD = [
    Kind("plain.jpg", file(jpeg), scene(), 1.5),
    Kind("capital.JPG", file(jpeg), scene(), 1.5),
    Kind("name.jfif", file(jpeg), scene(), 1.5),
    Kind("progressive.jpeg", file(lambda: jpeg(progressive=True)), scene(), 1.5),
    Kind("grey.jpg", saved(lambda: Image.fromarray(grey()), "JPEG", quality=95), three(grey()), 1.5),
    Kind("cmyk.jpg", saved(_cmyk, "JPEG", quality=95), scene(), 2.5),
    Kind("garbage_behind.jpg", file(lambda: jpeg() + b"garbage" * 999), scene(), 1.5),
    Kind("thumbnail.jpg", file(lambda: jpeg(exif=exif(1) + b"\xff\xd8\xff\xc0" * 9000)), scene(), 1.5),
    Kind("plain.png", file(png), scene()),
    Kind("wrong_name.jpg", file(png), scene()),
    Kind("alpha.png", saved(rgba, "PNG"), over_white(scene(), alpha()), 0.6),
    Kind("grey_alpha.png", saved(la, "PNG"), over_white(three(grey()), alpha()), 0.6),
    Kind("grey.png", saved(lambda: Image.fromarray(grey()), "PNG"), three(grey())),
    Kind("one_bit.png", saved(lambda: Image.fromarray(grey() > 128), "PNG"), three((grey() > 128) * np.uint8(255))),
    Kind("palette.png", saved(palette, "PNG"), stripes((255, 0, 0), (0, 200, 0), (0, 0, 255), (90, 90, 90))),
    Kind(
        "palette_transparent.png",
        saved(palette, "PNG", transparency=1),
        stripes((255, 0, 0), (255, 255, 255), (0, 0, 255), (90, 90, 90)),
    ),
    Kind(
        "palette_alphas.png",
        saved(palette, "PNG", transparency=bytes([255, 255, 0, 255])),
        stripes((255, 0, 0), (0, 200, 0), (255, 255, 255), (90, 90, 90)),
    ),
    Kind(
        "colour_key.png",
        saved(lambda: palette().convert("RGB"), "PNG", transparency=(0, 0, 255)),
        stripes((255, 0, 0), (0, 200, 0), (255, 255, 255), (90, 90, 90)),
    ),
    Kind("sixteen.png", file(lambda: sixteen("PNG")), three(grey())),
    Kind("sixteen.tif", file(lambda: sixteen("TIFF")), three(grey())),
    Kind("float.tif", saved(lambda: Image.fromarray(grey().astype(np.float32) / 255), "TIFF"), three(grey()), 0.6),
    Kind("swapped_profile.png", file(lambda: png(icc_profile=swapped_profile())), scene()[..., [1, 0, 2]], 1.0),
    Kind("swapped_profile.jpg", file(lambda: jpeg(icc_profile=swapped_profile())), scene()[..., [1, 0, 2]], 2.5),
    Kind("broken_profile.png", file(lambda: png(icc_profile=b"no profile" * 20)), scene()),
    Kind(
        "grey_with_profile.png",
        saved(lambda: Image.fromarray(grey()), "PNG", icc_profile=swapped_profile()),
        three(grey()),
    ),
    Kind("plain.bmp", saved(rgb, "BMP"), scene()),
    Kind("plain.tif", saved(rgb, "TIFF"), scene()),
    Kind("packed.tiff", saved(rgb, "TIFF", compression="tiff_lzw"), scene()),
    Kind("lossless.webp", saved(rgb, "WEBP", lossless=True), scene()),
    Kind("lossy.webp", saved(rgb, "WEBP", quality=95), scene(), 2.5),
    Kind("alpha.webp", saved(rgba, "WEBP", lossless=True, exact=True), over_white(scene(), alpha()), 0.6),
    Kind("plain.avif", saved(rgb, "AVIF", quality=95, speed=10), scene(), 2.0),
    Kind("animated.gif", file(lambda: _animated("GIF")), stripes((255, 0, 0), (0, 0, 255))),
    Kind("animated.webp", file(lambda: _animated("WEBP")), stripes((255, 0, 0), (0, 0, 255))),
    Kind("animated.png", file(lambda: _animated("PNG")), stripes((255, 0, 0), (0, 0, 255))),
    Kind(
        "transparent.gif",
        saved(palette, "GIF", transparency=2),
        stripes((255, 0, 0), (0, 200, 0), (255, 255, 255), (90, 90, 90)),
    ),
    Kind("emoji 🐈 \u202eabc.png", file(png), scene()),
    Kind("new\nline.png", file(png), scene()),
    Kind(os.fsdecode(b"latin-\xe9.png"), file(png), scene()),
    *_oriented(),
]


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _dangling(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere.jpg")


def _broken_crc() -> bytes:
    data = bytearray(png())
    data[data.index(b"IDAT") + 20] ^= 0xFF
    return bytes(data)


BROKEN = [
    Kind("empty.jpg", file(b""), reason="empty"),
    Kind("text.jpg", file(b"This is no picture at all, is it?"), reason="no picture"),
    Kind("page.png", file(b"<html><body>404</body></html>"), reason="no picture"),
    Kind("vector.png", file(b'<svg xmlns="http://www.w3.org/2000/svg"/>'), reason="no picture"),
    Kind("script.jpg", file(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), reason="no picture"),
    Kind("photoshop.jpg", file(b"8BPS\0\1" + bytes(64)), reason="no picture"),
    Kind("phone.jpg", file(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)), reason="no picture"),
    Kind("start_only.jpg", file(b"\xff\xd8\xff\xe0"), reason="cut short"),
    Kind("no_frame.jpg", file(b"\xff\xd8\xff\xe0\0\x10JFIF\0" + bytes(9) + b"\xff\xd9\0\0"), reason="no JPEG"),
    Kind("start_only.png", file(b"\x89PNG\r\n\x1a\n\0\0"), reason="cut short"),
    Kind("start_only.webp", file(b"RIFF\x10\0\0\0WEBPVP8X"), reason="cut short"),
    Kind("no_webp.webp", file(b"RIFF\x10\0\0\0WEBPABCD" + bytes(30)), reason="no WEBP"),
    Kind("zero_size.png", file(lambda: png_header(0, 10)), reason="0 x 10"),
    Kind("bomb.png", file(lambda: png_header(30_000, 30_000)), reason="decoded safely"),
    Kind("wide_bomb.png", file(lambda: png_header(2_000_000_000, 2)), reason="2000000000 x 2"),
    Kind("lies.png", file(lambda: png_header(WIDTH, HEIGHT)), reason="cannot be decoded", late=True),
    Kind("truncated.jpg", file(lambda: jpeg()[:900]), reason="cannot be decoded", late=True),
    Kind("truncated.png", file(lambda: png()[:-200]), reason="cannot be decoded", late=True),
    Kind(
        "truncated.webp",
        file(lambda: encoded(rgb(), "WEBP", lossless=True)[:90]),
        reason="cannot be decoded",
        late=True,
    ),
    Kind("truncated.bmp", file(lambda: encoded(rgb(), "BMP")[:900]), reason="cannot be decoded", late=True),
    Kind("crc.png", file(_broken_crc), reason="cannot be decoded", late=True),
    Kind(
        "not_a_number.tif",
        saved(lambda: Image.fromarray(np.full((HEIGHT, WIDTH), np.nan, np.float32)), "TIFF"),
        reason="finite",
        late=True,
    ),
]
if hasattr(os, "mkfifo"):
    BROKEN += [
        Kind("pipe.jpg", _fifo, reason="no regular file"),
        Kind("dangling.jpg", _dangling, reason="no regular file"),
    ]

# Names that are no pictures, and must not even be mentioned.
JUNK = [
    Kind(".hidden.jpg", file(jpeg)),
    Kind("._resource.jpg", file(b"\0\5\x16\7")),
    Kind("Thumbs.db", file(b"x")),
    Kind("readme.md", file(b"x")),
]
