"""Folders: what is found, what is passed over, what is said about it, and what is never opened."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from data.folder import Found
from data.item import Bucket, Item
from data.pixels import load_pixels
from data.sources import find_data
from tests.data.corpus import jpeg, png
from utils.errors import ProblemsError, UserError

links = pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")


def make(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png() if path.suffix.lower() in (".png", ".jpg") else b"")


def ids(found: Found) -> list[str]:
    return [item.id for item in found.items]


def test_sorted_by_path_whatever_the_disk_says(tmp_path: Path) -> None:
    names = ["b.png", "a/z.png", "a.png", "a/b/c.png", "Z.png", "a-b.png", "é.png"]
    for number, order in enumerate((names, names[::-1])):
        make(tmp_path / str(number), *order)
    first, second = (ids(find_data([tmp_path / str(number)])) for number in (0, 1))
    assert first == second == sorted(names)


def test_junk_is_passed_over(tmp_path: Path) -> None:
    make(
        tmp_path, "a.png", ".b.png", "._a.png", "__MACOSX/c.png", "@eaDir/d.png", ".git/e.png", "Thumbs.db", "notes.md"
    )
    found = find_data([tmp_path])
    assert ids(found) == ["a.png"]
    assert not found.unreadable
    assert not found.warnings


@links
def test_links_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    make(root, "real/a.png")
    make(elsewhere, "b.png", "more/c.png")
    (root / "a_link_to_real").symlink_to(root / "real")
    (root / "real" / "loop").symlink_to(root)
    (root / "away").symlink_to(elsewhere)
    (root / "away2").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root / "real")
    (root / "d.png").symlink_to(elsewhere / "b.png")
    assert ids(find_data([root])) == ["away/b.png", "away/more/c.png", "d.png", "real/a.png"]


def test_roots_stand_one_after_another_with_unique_ids(tmp_path: Path) -> None:
    make(tmp_path, "one/a.png", "one/b.png", "two/a.png")
    found = find_data([tmp_path / "two", tmp_path / "one", tmp_path / "two"])
    assert ids(found) == ["a.png", "a.png#2", "b.png", "a.png#3"]
    assert [Path(item.path).parent.name for item in found.items] == ["two", "one", "one", "two"]


def test_missing_root_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*nowhere.*starter"):
        find_data([tmp_path / "nowhere"])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("multiply.txt", "-1", ["multiply.txt", "'-1'", "0 to 10000"]),
        ("multiply.txt", "many", ["multiply.txt", "'many'"]),
        ("multiply.txt", "", ["multiply.txt", "must be a number"]),
        ("cond_dropout.txt", "1.5", ["cond_dropout.txt", "0 to 1"]),
        ("flip_p.txt", "nan", ["flip_p.txt", "0 to 1"]),
        ("loss_scale.txt", "inf", ["loss_scale.txt", "any number"]),
        ("global.yaml", "a: [", ["global.yaml, line 1", "YAML"]),
        ("global.yaml", "- a\n- b", ["global.yaml, line 1", "keys with values"]),
        ("local.yaml", "flip_p: 0.5\nmultiply: -2", ["local.yaml, line 2", "multiply", "'-2'"]),
        ("local.yaml", "shuffle_tags: perhaps", ["shuffle_tags", "true or false"]),
        ("local.yaml", "max_caption_length: 1.5", ["max_caption_length", "whole number"]),
        ("local.yaml", "main_prompt: [a]", ["main_prompt", "must be a text"]),
        ("local.yaml", "tags: {a: b}", ["tags", "list of tags"]),
        ("local.yaml", "tags:\n- {tag: a, weight: -1}", ["tags", "0 or more"]),
        ("local.yaml", "tags:\n- {tag: a, wait: 1}", ["tags", "{tag: red, weight: 0.5}"]),
        ("local.yaml", "a: &x [b]\nc: *x", ["local.yaml, line 2", "alias"]),
        ("local.yaml", "a: !!python/object/apply:os.system [ls]", ["local.yaml, line 1", "tag"]),
        ("local.yaml", "caption: {caption: a}", ["another caption"]),
        ("x.yaml", "rating: high", ["x.yaml, line 1", "rating", "'high'"]),
    ],
)
def test_values_that_cannot_be_meant_are_refused(tmp_path: Path, name: str, content: str, words: list[str]) -> None:
    make(tmp_path, "x.png")
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ProblemsError) as error:
        find_data([tmp_path])
    assert len(error.value.problems) == 1
    for word in words:
        assert word in str(error.value)


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    make(tmp_path, "a/x.png", "b/y.png")
    (tmp_path / "a" / "multiply.txt").write_text("-1", encoding="utf-8")
    (tmp_path / "b" / "y.yaml").write_text("flip_p: 7\nrating: x", encoding="utf-8")
    with pytest.raises(ProblemsError) as error:
        find_data([tmp_path])
    assert len(error.value.problems) == 3


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.yaml", b"a: [", "x.yaml, line 1: is no valid YAML"),
        ("x.yaml", b"a: 1\n\tb: 2", "x.yaml, line 2: is no valid YAML"),
        ("x.yaml", b"---\na: 1\n---\nb: 2", "more than one YAML document"),
        ("x.yaml", b"[" * 5000, "x.yaml"),
        ("x.yaml", b"a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]", "alias"),
        ("x.yaml", b"\x01", "x.yaml"),
        ("x.txt", b"a" * ((1 << 20) + 1), "larger than 1 MiB"),
    ],
)
def test_a_picture_whose_caption_cannot_be_understood_is_left_out(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    make(tmp_path, "x.png", "y.png")
    (tmp_path / name).write_bytes(content)
    found = find_data([tmp_path])
    assert ids(found) == ["y.png"]
    assert reason in str(found.unreadable[0])
    assert len(found.unreadable) == 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.txt", "käse".encode("cp1252"), "cp1252"),
        ("x.yaml", b"multipli: 2", "unknown key `multipli`, perhaps `multiply` is meant"),
        ("x.yaml", b"rating: 1\nrating: 2", "`rating` is given twice"),
        ("x.jpg", png(), "shares its captions with x.png"),
    ],
)
def test_warnings_name_the_file(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    make(tmp_path, "x.png")
    (tmp_path / name).write_bytes(content)
    (note,) = find_data([tmp_path]).warnings
    assert note.where == str(tmp_path / name)
    assert words in note.text


def test_captions_are_data_and_nothing_outside_is_opened(tmp_path: Path) -> None:
    """A canary lies beside the root; captions, YAML and names point at it; no file but those of the root is opened."""
    canary = tmp_path / "canary.txt"
    canary.write_text("CANARY", encoding="utf-8")
    root = tmp_path / "root"
    make(root, "a.png", "b.png", "c.png", "d.jpg", "..%2f..%2fcanary_1.png")
    (root / "a.txt").write_text(str(canary), encoding="utf-8")
    (root / "b.yaml").write_text(f"caption: {canary}\ntags: ['../canary.txt', 'file://{canary}']", encoding="utf-8")
    (root / "c.caption").write_text("../canary.txt", encoding="utf-8")
    (root / "d.jpg").write_bytes(jpeg(comment=str(canary).encode()))
    opened: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if watching and event in ("open", "os.listdir", "os.scandir"):
            opened.append(os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else "")

    sys.addaudithook(watch)
    found = find_data([root])
    for item in found.items:
        load_pixels(item, Bucket(64, 64), rng=None, flip_p=0, crop_jitter=0)
    watching = False
    code = (str(Path(sys.prefix).resolve()), str(Path(sys.base_prefix).resolve()), sys.prefix, str(Path.cwd()))
    outside = [path for path in opened if path and not path.startswith((str(root), *code)) and path != "."]
    assert outside == []
    assert any(path.endswith("a.txt") for path in opened)
    assert not any("CANARY" in str(item) for item in found.items)


def test_a_copy_elsewhere_gives_the_same_items(tmp_path: Path) -> None:
    make(tmp_path / "a", "x/1.png", "y/2.png", "3.png")
    (tmp_path / "a" / "x" / "1.yaml").write_text("tags: [b, a]\nmultiply: 0.3", encoding="utf-8")
    shutil.copytree(tmp_path / "a", tmp_path / "deep" / "b")

    def content(root: Path) -> list[tuple[object, ...]]:
        return [(item.id, item.caption, item.multiply) for item in find_data([root]).items]

    assert content(tmp_path / "a") == content(tmp_path / "deep" / "b")


def test_items_are_plain(tmp_path: Path) -> None:
    make(tmp_path, "x_1.png")
    (item,) = find_data([tmp_path]).items
    assert item == Item("x_1.png", str(tmp_path / "x_1.png"), 96, 64, item.caption)
