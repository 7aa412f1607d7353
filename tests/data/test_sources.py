"""Every form of data_root, and manifests in JSON and JSONL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.item import Caption, Tag
from data.sources import Source, find_data, sources
from tests.data.corpus import png
from utils.errors import ProblemsError, UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("one/a.png", "two/b.png", "two/c.png", "x_1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png())
    return tmp_path


def manifest(root: Path, entries: Any, name: str = "list.json") -> str:
    path = root / name
    lines = "\n".join(map(json.dumps, entries)) if name.endswith("l") else json.dumps(entries)
    path.write_text(lines, encoding="utf-8")
    return str(path)


def test_forms_of_data_root() -> None:
    assert sources("a") == (Source("a", False),)
    assert sources("a.json") == (Source("a.json", True),)
    assert sources("a.JSONL") == (Source("a.JSONL", True),)
    assert sources(["a", "b.json"]) == (Source("a", False), Source("b.json", True))
    assert sources({"resolver": "directory", "path": "a"}) == (Source("a", False),)
    assert sources({"resolver": "json", "path": "odd.name"}) == (Source("odd.name", True),)
    multi = {"resolver": "multi", "resolvers": [{"resolver": "directory", "path": "a"}, "b", ["c.json"]]}
    assert sources(multi) == (Source("a", False), Source("b", False), Source("c.json", True))


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (3, "data_root = 3: must be a folder"),
        ([], "names nothing"),
        ("", "must be a folder"),
        ([[], None], "must be a folder"),
        ({"resolver": "folder", "path": "a"}, "resolver = 'folder': must be directory, json or multi"),
        ({"resolver": "directory"}, "path: must be the path of a directory"),
        ({"resolver": "multi", "resolvers": "a"}, "resolvers = 'a': must be a list"),
        ({"resolver": "directory", "path": "a", "paht": "b"}, "paht: unknown key"),
    ],
)
def test_forms_that_are_none(form: Any, words: str) -> None:
    with pytest.raises(ProblemsError) as error:
        sources(form)
    assert words in str(error.value)


def test_a_bomb_of_lists_ends() -> None:
    form: Any = "a"
    for _ in range(50):
        form = [form]
    with pytest.raises(ProblemsError, match="nested"):
        sources(form)


def test_several_roots_concatenate(root: Path) -> None:
    found = find_data([str(root / "two"), str(root / "one")])
    assert [item.id for item in found.items] == ["b.png", "c.png", "a.png"]


def test_nested_roots_are_warned_about(root: Path) -> None:
    roots = [str(root / "one"), str(root), str(root / "two"), str(root)]
    found = find_data(roots)
    assert len(found.items) == 1 + 4 + 2 + 4
    assert [note.where for note in found.warnings] == [roots[0], roots[0], roots[2], roots[2], roots[3]]
    assert "count twice" in found.warnings[0].text


def test_nothing_to_train_on(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"(?s)no picture.*1 cannot be read.*a.jpg: the file is empty"):
        find_data(str(tmp_path))


@pytest.mark.parametrize("name", ["list.json", "list.jsonl"])
def test_manifest(root: Path, name: str) -> None:
    (root / "words.txt").write_text("from a file, red", encoding="utf-8")
    (root / "words.yaml").write_text("main_prompt: from yaml\nmultiply: 4", encoding="utf-8")
    entries = [
        {"image": "two/c.png", "caption": "a cat, red"},
        {
            "image": "one/a.png",
            "caption": {"main_prompt": "m", "tags": ["t", {"tag": "u", "weight": 2}]},
            "rating": 0.5,
        },
        {"image": "x_1.png"},
        {"image": "two/b.png", "caption": "words.txt", "multiply": 1.5},
        {"image": "two/../one/a.png", "caption": "words.yaml", "multiply": 5},
        {"image": str(root / "two" / "b.png"), "main_prompt": 1e-6, "shuffle_tags": True, "batch_id": None},
    ]
    items = find_data(manifest(root, entries, name)).items
    assert [item.id for item in items] == [
        "two/c.png",
        "one/a.png",
        "x_1.png",
        "two/b.png",
        "one/a.png#2",
        "two/b.png#2",
    ]
    assert [item.caption for item in items[:4]] == [
        Caption("a cat", (Tag("red"),)),
        Caption("m", (Tag("t"), Tag("u", 2.0))),
        Caption("x"),
        Caption("from a file", (Tag("red"),)),
    ]
    assert items[1].rating == 0.5
    assert items[3].multiply == 1.5
    assert (items[4].caption.main_prompt, items[4].multiply) == ("from yaml", 5.0)
    assert (items[5].caption.main_prompt, items[5].shuffle_tags, items[5].batch_id) == ("1e-06", True, "")


def test_a_caption_is_a_path_only_below_the_manifest(root: Path) -> None:
    inner = root / "inner"
    inner.mkdir()
    (root / "canary.txt").write_text("CANARY", encoding="utf-8")
    (inner / "link.txt").symlink_to(root / "canary.txt")
    captions = ["../canary.txt", str(root / "canary.txt"), "link.txt", "missing.txt", "a.png", "a.txt\nb.txt"]
    entries = [{"image": "../x_1.png", "caption": caption} for caption in captions]
    items = find_data(manifest(inner, entries)).items
    assert [item.caption.main_prompt for item in items] == [" ".join(caption.split()) for caption in captions]


def test_pictures_that_cannot_be_read_are_left_out(root: Path) -> None:
    (root / "bad.png").write_bytes(b"bad")
    found = find_data(
        manifest(root, [{"image": "bad.png"}, {"image": "gone.png"}, {"image": "one"}, {"image": "x_1.png"}])
    )
    assert [item.id for item in found.items] == ["x_1.png"]
    assert ["no picture" in p.reason or "not there" in p.reason for p in found.unreadable] == [True] * 3
    assert "list.json, entry 2" in found.unreadable[1].reason


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"image": "x_1.png"}', "must be a list of entries"),
        ("[1]", "entry 1: must be an entry"),
        ('[{"picture": "x_1.png"}]', "entry 1: image: every entry needs"),
        ('[{"image": "x_1.png", "multiply": -1}]', "entry 1: multiply = '-1': must be a number"),
        ('[{"image": "x_1.png"},\n{"image": }]', "list.json, line 2: is no valid JSON"),
        ("[" * 100_000, "list.json"),
        ("", "list.json, line 1: is no valid JSON"),
    ],
)
def test_mistakes_in_manifests(root: Path, content: str, words: str) -> None:
    (root / "list.json").write_text(content, encoding="utf-8")
    with pytest.raises(ProblemsError) as error:
        find_data(str(root / "list.json"))
    assert words in str(error.value)


def test_mistakes_in_lines(root: Path) -> None:
    (root / "list.jsonl").write_text('{"image": "x_1.png"}\n\n{"image": "x_1.png", "flip_p": 3}\n', encoding="utf-8")
    with pytest.raises(ProblemsError, match=r"list.jsonl, line 3: flip_p = '3'"):
        find_data(str(root / "list.jsonl"))


def test_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(ProblemsError, match="is not there"):
        find_data(str(tmp_path / "no.json"))
