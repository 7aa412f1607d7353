"""A contact sheet: pictures of a batch as the networks get them, each with its caption below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from utils.errors import printable

if TYPE_CHECKING:
    from torch import Tensor

MOST = 16
CELL = 192
TEXT_SIZE = 12
TEXT_LINES = 3
MOST_LETTERS = 200
GAP = 6


def contact_sheet(pictures: Sequence[Tensor], captions: Sequence[str]) -> Image.Image:
    """`pictures`, uint8 (3, H, W) each, on one sheet, the first sixteen of them; an empty caption is shown as such."""
    count = min(MOST, len(pictures))
    columns = max(1, math.ceil(math.sqrt(count)))
    rows = max(1, math.ceil(count / columns))
    width, height = CELL + 2 * GAP, CELL + 3 * GAP + TEXT_LINES * (TEXT_SIZE + 3)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT_SIZE)
    for place in range(count):
        left, top = place % columns * width + GAP, place // columns * height + GAP
        picture = Image.fromarray(pictures[place].permute(1, 2, 0).cpu().numpy())
        scale = CELL / max(picture.size)
        small = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
        sheet.paste(small, (left + (CELL - small.width) // 2, top + (CELL - small.height) // 2))
        text = f"{picture.width} x {picture.height}: {printable(captions[place]) or '(no caption)'}"
        pen.text((left, top + CELL + GAP), _wrapped(text, font), fill="black", font=font, spacing=2)
    return sheet


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """`text` in lines that fit a cell; what does not fit into the last one is cut."""
    lines = [""]
    for word in text[:MOST_LETTERS].split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= CELL or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    while any(font.getlength(line) > CELL for line in lines):
        lines = [line if font.getlength(line) <= CELL else line[:-1] for line in lines]
    cut = len(lines) > TEXT_LINES or len(text) > MOST_LETTERS
    return "\n".join(lines[:TEXT_LINES]) + (" ..." if cut else "")
