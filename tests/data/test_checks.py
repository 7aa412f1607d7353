"""Every picture decoded once, and pictures that are there twice."""

from __future__ import annotations

from pathlib import Path

from data.checks import check_pictures, find_duplicates
from data.item import Item
from data.sources import find_data
from tests.data.corpus import BROKEN, GOOD, jpeg, png


def test_check_finds_what_only_decoding_finds(tmp_path: Path) -> None:
    kinds = [kind for kind in (*GOOD, *BROKEN) if kind.name.isascii()]
    for kind in kinds:
        kind.write(tmp_path / kind.name)
    items = find_data([tmp_path]).items
    seen: list[int] = []
    broken = check_pictures(items, workers=2, progress=seen.append)
    assert {Path(picture.path).name for picture in broken} == {kind.name for kind in BROKEN if kind.late}
    assert all(picture.reason for picture in broken)
    assert sum(seen) == len(items)


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
