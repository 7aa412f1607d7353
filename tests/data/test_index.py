"""The index: a second start reads only what has changed, and never believes what it cannot know."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import data.scan
from data.folder import Found
from data.index import Index, Stamp, cache_folder, index_path
from data.sources import find_data
from tests.data.corpus import jpeg, png
from utils.errors import ProblemsError

LONG_AGO = 1_600_000_000


def write(path: Path, content: bytes, when: float = LONG_AGO) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (when, when))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    for number in range(5):
        write(root / "sub" / f"{number}.png", png())
        write(root / "sub" / f"{number}.txt", f"picture {number}, red".encode())
    write(root / "broken.jpg", b"no picture")
    write(root / "foreign.jpg", jpeg())
    write(root / "foreign.txt", "käse".encode("cp1252"))
    write(root / "yaml.jpg", jpeg())
    write(root / "yaml.yaml", b"main_prompt: y\nmultiply: 2")
    return root


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that a scan reads."""
    names: list[str] = []
    read: Callable[[data.scan.Job], data.scan.Fact] = data.scan._read

    def counting(job: data.scan.Job) -> data.scan.Fact:
        names.append(job[1])
        return read(job)

    monkeypatch.setattr(data.scan, "_read", counting)
    return names


def start(root: Path) -> Found:
    return find_data(str(root), index_kind="beside")


def test_second_start_reads_nothing_and_finds_the_same(root: Path, opened: list[str]) -> None:
    plain = find_data(str(root))
    opened.clear()
    first = start(root)
    assert len(opened) == 15
    opened.clear()
    assert start(root) == first == plain
    assert opened == []
    assert len(first.unreadable) == len(first.warnings) == 1
    beside = {path.name for path in root.parent.iterdir() if path != root}
    assert beside == {".root.emulsion.json", ".root.emulsion-items.json"}


@pytest.mark.parametrize("how", ["size", "time"])
def test_a_changed_file_is_read_again(root: Path, opened: list[str], how: str) -> None:
    start(root)
    opened.clear()
    content = b"new words" if how == "size" else b"picture 3, big"
    write(root / "sub" / "3.txt", content, LONG_AGO if how == "size" else LONG_AGO + 1)
    found = start(root)
    assert opened == ["3.txt"]
    assert found == find_data(str(root))


def test_new_and_removed_files(root: Path, opened: list[str]) -> None:
    start(root)
    opened.clear()
    write(root / "sub" / "9.png", png())
    (root / "sub" / "1.png").unlink()
    found = start(root)
    assert opened == ["9.png"]
    assert found == find_data(str(root))
    rows = json.loads((root.parent / ".root.emulsion.json").read_text())["files"]["sub"]
    assert "9.png" in rows
    assert "1.png" not in rows


def test_files_as_young_as_the_index_are_read_again(root: Path, opened: list[str]) -> None:
    """Within one tick of the clock a file may change and keep size and time."""
    now = time.time()
    write(root / "sub" / "3.txt", b"old words", now)
    start(root)
    opened.clear()
    write(root / "sub" / "3.txt", b"new words", now)
    found = start(root)
    assert opened == ["3.txt"]
    assert "new words" in {item.caption.main_prompt for item in found.items}


BROKEN = [
    "",
    "{",
    "[]",
    "{}",
    '{"version": 1}',
    '{"version": 1, "files": {"": {"a": 3}}, "started_ns": 1}',
    '{"version": 99}',
    "\0",
]


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_index_is_forgotten(root: Path, opened: list[str], content: str) -> None:
    first = start(root)
    (root.parent / ".root.emulsion-items.json").write_text(content)
    opened.clear()
    assert start(root) == first
    assert opened == []
    for name in (".root.emulsion.json", ".root.emulsion-items.json"):
        (root.parent / name).write_text(content)
    assert start(root) == first
    assert len(opened) == 15


def test_items_that_were_tampered_with_are_not_believed(root: Path) -> None:
    first = start(root)
    path = root.parent / ".root.emulsion-items.json"
    path.write_text(path.read_text().replace('"red"', '"bad"'))
    assert start(root) == first


@pytest.mark.parametrize(
    ("name", "content", "changed"),
    [
        ("global.yaml", b"multiply: 7", 6),
        ("sub/global.yaml", b"multiply: 7", 5),
        ("sub/local.yaml", b"multiply: 7", 5),
        ("sub/multiply.txt", b"7", 5),
        ("sub/1.yaml", b"multiply: 7", 1),
    ],
)
def test_settings_reach_the_folders_below(root: Path, name: str, content: bytes, changed: int) -> None:
    start(root)
    write(root / name, content)
    assert [item.multiply for item in start(root).items].count(7.0) == changed
    write(root / name, content.replace(b"7", b"8"), LONG_AGO + 5)
    found = start(root)
    assert [item.multiply for item in found.items].count(8.0) == changed
    assert start(root) == found
    (root / name).unlink()
    assert start(root) == find_data(str(root))


def test_problems_are_said_at_every_start_and_gone_when_mended(root: Path) -> None:
    write(root / "sub" / "multiply.txt", b"-1")
    for _ in range(2):
        with pytest.raises(ProblemsError, match=r"multiply\.txt"):
            start(root)
    write(root / "sub" / "multiply.txt", b"3", LONG_AGO + 1)
    assert start(root) == find_data(str(root))


def test_a_root_that_moved_is_read_again(root: Path, opened: list[str]) -> None:
    start(root)
    moved = root.with_name("moved")
    root.rename(moved)
    for name in (".root.emulsion.json", ".root.emulsion-items.json"):
        (root.parent / name).rename(root.parent / name.replace("root", "moved"))
    assert start(moved) == find_data(str(moved))


def test_facts_of_the_wrong_kind_do_not_end_a_start(root: Path) -> None:
    first = start(root)
    path = root.parent / ".root.emulsion.json"
    (root.parent / ".root.emulsion-items.json").unlink()
    document = json.loads(path.read_text())
    document["files"]["sub"]["1.png"][2:] = ["not", "a", "header", "at all"]
    document["files"]["sub"]["1.txt"][2:] = [1, 2, 3]
    path.write_text(json.dumps(document))
    assert start(root) == first


def test_a_place_that_cannot_be_written_costs_nothing_but_time(root: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("x")
    index = Index(blocked / "index.json")
    index.learn("", "a", Stamp(1, 2), [1])
    index.save()
    assert blocked.read_text() == "x"


def test_where_it_is_kept(tmp_path: Path) -> None:
    assert index_path("off", tmp_path) is None
    assert index_path("beside", tmp_path / "set") == tmp_path.resolve() / ".set.emulsion.json"
    inside = index_path("cache", tmp_path / "set")
    assert inside is not None
    assert inside.is_relative_to(cache_folder())
    assert inside != index_path("cache", tmp_path / "other")
    assert cache_folder({"XDG_CACHE_HOME": "/x"}) == Path("/x/emulsion")
