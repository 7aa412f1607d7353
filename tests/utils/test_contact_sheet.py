"""The contact sheet of a batch."""

from __future__ import annotations

import numpy as np
import torch

from utils.contact_sheet import CELL, MOST, contact_sheet


def flat(colour: tuple[int, int, int], height: int, width: int) -> torch.Tensor:
    return torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, height, width)


def test_pictures_stand_in_order_each_with_its_caption() -> None:
    pictures = [flat((200, 0, 0), 64, 64), flat((0, 200, 0), 32, 64), flat((0, 0, 200), 64, 32)]
    sheet = np.asarray(contact_sheet(pictures, ["red", "green", ""]))
    width, height = sheet.shape[1] // 2, sheet.shape[0] // 2
    for place, colour in enumerate(((200, 0, 0), (0, 200, 0), (0, 0, 200))):
        top, left = place // 2 * height, place % 2 * width
        cell = sheet[top : top + height, left : left + width]
        middle = cell[6 + CELL // 2, 6 + CELL // 2]
        assert tuple(middle) == colour
        assert (cell[CELL + 8 :] < 100).any(), "the caption, or that there is none, is written below"
    assert (sheet[height:, width:] == 255).all()


def test_large_batches_and_long_words_fit() -> None:
    pictures = [flat((9, 9, 9), 8, 8)] * 40
    sheet = contact_sheet(pictures, ["x" * 5000] * 20 + ["word " * 1000] * 20)
    few = contact_sheet(pictures[:MOST], ["a"] * MOST)
    assert sheet.size == few.size
