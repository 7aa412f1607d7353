"""The training set: what is found reaches the split, the report and the memory of the next start."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL.PngImagePlugin import PngInfo

import data.checks
from data.dataset import TrainingSet, read_training_set
from data.validation_file import ValidationFile
from tests.data.corpus import png
from utils.config import DataOptions


def picture(number: int) -> bytes:
    return png(pnginfo=info(number))


def info(number: int) -> PngInfo:
    text = PngInfo()
    text.add_text("number", str(number))
    return text


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    for number in range(12):  # each twice
        path = root / f"{number:02}.png"
        path.write_bytes(picture(number // 2))
        os.utime(path, (1_600_000_000, 1_600_000_000))
    (root / "12.png").write_bytes(picture(99)[:-30])
    os.utime(root / "12.png", (1_600_000_000, 1_600_000_000))
    return root


def read(root: Path, seed: int = 1, *, check_data: bool = False) -> TrainingSet:
    options = DataOptions(data_root=str(root), resolution=64, data_index="beside", check_data=check_data)
    validation = ValidationFile(auto_split_proportion=0.3, seed=seed)
    return read_training_set(options, seed=1, epochs=3, max_steps=5, validation=validation)


def test_copies_are_told_and_stay_on_one_side(root: Path) -> None:
    for seed in range(5):
        found = read(root, seed)
        held = {Path(item.path).read_bytes() for item in found.watched[0].items}
        assert held
        assert held.isdisjoint(Path(item.path).read_bytes() for item, _ in found.placed)
    text = "\n".join(found.report().lines)
    assert "6 pictures there more than once" in text
    assert "run: 1 epoch, 5 updates" in text


def test_a_second_check_decodes_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read(root, check_data=True)
    assert [Path(picture.path).name for picture in first.found.unreadable] == ["12.png"]
    monkeypatch.setattr(data.checks, "_reason", lambda path: pytest.fail(f"{path} is decoded again"))
    assert read(root, check_data=True).found == first.found
