"""Every picture decoded once, and pictures that are there twice."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import data.checks
from data.checks import Memory, check_pictures, find_duplicates
from data.item import Item
from data.sources import find_data
from tests.data.corpus import BROKEN, GOOD, jpeg, png

LONG_AGO = 1_600_000_000


def test_check_finds_what_only_decoding_finds(tmp_path: Path) -> None:
    kinds = [kind for kind in (*GOOD, *BROKEN) if kind.name.isascii()]
    for kind in kinds:
        kind.write(tmp_path / kind.name)
    items = find_data([tmp_path]).items
    broken = check_pictures(items, workers=2)
    assert {Path(picture.path).name for picture in broken} == {kind.name for kind in BROKEN if kind.late}
    assert all(picture.reason for picture in broken)


def test_what_was_decoded_once_is_remembered_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (*GOOD[:3], *(kind for kind in BROKEN if kind.late and kind.name.isascii())):
        kind.write(tmp_path / kind.name)
    (tmp_path / "good.png").write_bytes(png())
    for path in tmp_path.iterdir():
        os.utime(path, (LONG_AGO, LONG_AGO))
    items = find_data([tmp_path]).items
    memory_path = tmp_path.with_name("memory.json")
    first = check_pictures(items, workers=2, memory=Memory(memory_path))
    assert first
    decoded: list[str] = []
    decode = data.checks._reason

    def noted(path: str) -> str:
        decoded.append(path)
        return decode(path)

    monkeypatch.setattr(data.checks, "_reason", noted)
    assert check_pictures(items, workers=2, memory=Memory(memory_path)) == first
    assert decoded == []
    (tmp_path / "good.png").write_bytes(png()[:-30])
    again = check_pictures(items, workers=2, memory=Memory(memory_path))
    assert decoded == [str(tmp_path / "good.png")]
    assert {picture.path for picture in again} == {*(picture.path for picture in first), str(tmp_path / "good.png")}


def groups(items: tuple[Item, ...]) -> list[list[str]]:
    return [[item.id for item in group] for group in find_duplicates(items)]


def test_duplicates_by_content(tmp_path: Path) -> None:
    large = bytes(100_000)
    files = {
        "a.png": png(),
        "b.jpg": jpeg(),
        "c.png": png(),
        "d.jpg": jpeg(),
        "e.png": png(),
        "f.png": png() + large + b"1",  # equal in size and in the first block, different at the end
        "g.png": png() + large + b"2",
        "h.png": png() + large + b"1",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    items = find_data([tmp_path]).items
    assert groups(items) == [["a.png", "c.png", "e.png"], ["b.jpg", "d.jpg"], ["f.png", "h.png"]]


def test_one_file_listed_twice_is_no_duplicate(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    assert groups(find_data([tmp_path, tmp_path]).items) == []


def test_known_contents_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "b.png", "c.jpg"):
        (tmp_path / name).write_bytes(jpeg() if name == "c.jpg" else png())
        os.utime(tmp_path / name, (LONG_AGO, LONG_AGO))
    found = find_data(str(tmp_path), index_kind="beside")
    memory_path = tmp_path.with_name("memory.json")
    first = find_duplicates(found.items, found.sizes, memory=Memory(memory_path))
    assert [[item.id for item in group] for group in first] == [["a.png", "b.png"]]
    monkeypatch.setattr(data.checks, "_content", lambda path: pytest.fail(f"{path} is read again"))
    assert find_duplicates(found.items, found.sizes, memory=Memory(memory_path)) == first


def test_a_file_that_has_gone_is_no_duplicate(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(png())
    items = find_data([tmp_path]).items
    (tmp_path / "b.png").unlink()
    assert groups(items) == [["a.png", "c.png"]]
