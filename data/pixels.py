"""From a picture's file to the pixels of a visit: decoded safely, upright, in sRGB, cropped, resized and flipped."""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms

from data.headers import FORMATS, MAX_PIXELS, Header, PictureError, read_header
from data.item import Bucket, Item

if TYPE_CHECKING:
    import torch

Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)

# Scaled JPEG decoding averages in another way than our own resize: at twice the target nobody can see it (50 dB).
_DRAFT_MARGIN = 2

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Crop(NamedTuple):
    """A box in an image, as shares of its width and height, and whether the image is mirrored afterwards."""

    left: float
    top: float
    right: float
    bottom: float
    flip: bool


def load_pixels(
    item: Item,
    bucket: Bucket,
    *,
    rng: Random | None,
    flip_p: float,
    crop_jitter: float,
    background: Colour = WHITE,
) -> torch.Tensor:
    """The picture of `item` as it is trained in `bucket`: uint8 (3, H, W), sRGB.

    `rng` is the visit's stream; `None` is for validation: the middle of the picture, without jitter or flip.

    Raises:
        PictureError: the file cannot be used, with the reason (any error of the decoder becomes one).
    """
    header = read_header(item.path)
    crop = draw_crop(header.width, header.height, bucket, rng=rng, flip_p=flip_p, crop_jitter=crop_jitter)
    image, profile = decode(item.path, header, crop, bucket, background)
    return _to_srgb(_resize(image, crop, bucket), profile)


def draw_crop(
    width: int, height: int, bucket: Bucket, *, rng: Random | None, flip_p: float, crop_jitter: float
) -> Crop:
    """What part of an upright image of this size is used, and whether it is mirrored.

    Seven numbers are drawn, always and in this order, so that no option shifts the draws of another: the jitter of
    the left, top, right and bottom side, two for the place of the aspect crop (their mean is triangular), the flip.
    A side loses U(0, j) of the short side, where j is `crop_jitter`, or less when the image would become smaller than
    its bucket.
    """
    draws = [rng.random() for _ in range(7)] if rng is not None else [0.0, 0.0, 0.0, 0.0, 0.5, 0.5, 1.0]
    spare = min(width / bucket.width, height / bucket.height) - 1.0
    jitter = max(0.0, min(crop_jitter, spare / 2.0)) * min(width, height)
    left, top = draws[0] * jitter, draws[1] * jitter
    right, bottom = width - draws[2] * jitter, height - draws[3] * jitter
    place = (draws[4] + draws[5]) / 2.0
    aspect = bucket.width / bucket.height
    if right - left > (bottom - top) * aspect:
        extra = (right - left) - (bottom - top) * aspect
        left, right = left + extra * place, right - extra * (1.0 - place)
    else:
        extra = (bottom - top) - (right - left) / aspect
        top, bottom = top + extra * place, bottom - extra * (1.0 - place)
    return Crop(left / width, top / height, right / width, bottom / height, draws[6] < flip_p)


def decode(
    path: str, header: Header, crop: Crop, bucket: Bucket, background: Colour = WHITE
) -> tuple[Image.Image, bytes | None]:
    """The picture, upright and in three channels, and the colour profile it is still in (`None`: sRGB).

    JPEGs are decoded at a fraction of their size when the bucket needs no more.

    Raises:
        PictureError: the file cannot be decoded, with the reason.
    """
    try:
        with Image.open(Path(path), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise PictureError(f"{image.width} x {image.height} pixels are more than are decoded safely")
            _draft(image, header, crop, bucket)
            image.load()
            pixels, profile = _three_channels(image, background)
    except PictureError:
        raise
    except Exception as error:  # a stranger's file: decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise PictureError(f"cannot be decoded: {type(error).__name__}: {error}") from error
    method = _UPRIGHT.get(header.orientation)
    return (pixels if method is None else pixels.transpose(method)), profile


def _draft(image: Image.Image, header: Header, crop: Crop, bucket: Bucket) -> None:
    """Let a JPEG come out smaller: the crop still holds twice the bucket's pixels each way."""
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return
    shrink = min(
        (crop.right - crop.left) * header.width / bucket.width,
        (crop.bottom - crop.top) * header.height / bucket.height,
    )
    scale = shrink / _DRAFT_MARGIN
    if scale >= 2:
        image.draft(image.mode, (int(image.width / scale), int(image.height / scale)))


def _three_channels(image: Image.Image, background: Colour) -> tuple[Image.Image, bytes | None]:
    profile: bytes | None = image.info.get("icc_profile")
    if image.mode == "RGB" and "transparency" not in image.info:
        return image, profile
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _eight_bits(image), None
    if image.mode in ("CMYK", "LAB"):
        return _by_profile(image, profile).convert("RGB"), None
    if image.has_transparency_data:
        return _composite(image.convert("RGBA"), background, profile), None
    # A profile for grey or palette pixels does not fit RGB ones, except where it describes the colours of a palette.
    return image.convert("RGB"), profile if image.mode == "P" else None


def _composite(image: Image.Image, background: Colour, profile: bytes | None) -> Image.Image:
    """What is seen on `background`: the colours under transparent pixels are not."""
    colours, alpha = image.convert("RGB"), image.getchannel("A")
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(_by_profile(colours, profile), mask=alpha)
    return canvas


def _eight_bits(image: Image.Image) -> Image.Image:
    """Sixteen bits of grey scaled to eight (Pillow itself would cut them off at 255)."""
    values = np.asarray(image)
    if image.mode == "F":
        if not np.isfinite(values).all():
            raise PictureError("its pixels are not all finite numbers")
        values = np.clip(values, 0.0, 1.0) * 65535.0 if values.max(initial=0.0) <= 1.0 else values * 257.0
    wide = np.clip(values.astype(np.float64), 0, 65535)
    return Image.fromarray(np.rint(wide / 257.0).astype(np.uint8)).convert("RGB")


def _resize(image: Image.Image, crop: Crop, bucket: Bucket) -> torch.Tensor:
    import torch

    box = (
        min(round(crop.left * image.width), image.width - 1),
        min(round(crop.top * image.height), image.height - 1),
        round(crop.right * image.width),
        round(crop.bottom * image.height),
    )
    box = (box[0], box[1], max(box[2], box[0] + 1), max(box[3], box[1] + 1))
    pixels = torch.from_numpy(np.array(image.crop(box))).permute(2, 0, 1)
    if pixels.shape[1:] != (bucket.height, bucket.width):
        # uint8 in, uint8 out, antialiased: thirteen times as fast as Pillow's Lanczos and as close to the ideal.
        pixels = torch.nn.functional.interpolate(
            pixels[None], (bucket.height, bucket.width), mode="bicubic", antialias=True
        )[0]
    return (pixels.flip(2) if crop.flip else pixels).contiguous()


def _to_srgb(pixels: torch.Tensor, profile: bytes | None) -> torch.Tensor:
    """The pixels in sRGB: converted after the resize, when few are left."""
    import torch

    if profile is None or _transform(profile, "RGB") is None:
        return pixels
    image = _by_profile(Image.fromarray(pixels.permute(1, 2, 0).numpy()), profile)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _by_profile(image: Image.Image, profile: bytes | None) -> Image.Image:
    transform = None if profile is None else _transform(profile, image.mode)
    if transform is None:
        return image
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None
    return converted


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> Any:
    """The way from `profile` to sRGB; `None` when there is nothing to do, or nothing that can be done.

    A profile that is broken or belongs to another kind of pixels is ignored, as every viewer does.
    """
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return None
        target = ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(source, target, mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
