"""What wins of global.yaml, folder files, local.yaml and sidecars: a table of folders and what their picture gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data.sources import find_data
from tests.data.corpus import png

Files = dict[str, str | bytes]

PICTURE = "sub/deep/cat_01"

# Files are relative to the data root; a name that begins with a dot is that of the picture with this extension.
# Expected: attributes of the picture's item, its caption as "main prompt | tag, tag:weight".
CASES: list[tuple[str, Files, dict[str, Any]]] = [
    ("name up to the underscore", {}, {"caption": "cat"}),
    ("txt", {".txt": "a cat, red"}, {"caption": "a cat | red"}),
    ("caption file", {".caption": "a cat, red"}, {"caption": "a cat | red"}),
    ("suffix in capitals", {".TXT": "a cat"}, {"caption": "a cat"}),
    ("caption over txt", {".txt": "t, a", ".caption": "c, b"}, {"caption": "c | b, a"}),
    ("yml over caption", {".caption": "c, b", ".yml": "caption: y"}, {"caption": "y | b"}),
    ("yaml over yml", {".yml": "multiply: 2", ".yaml": "multiply: 3"}, {"multiply": 3.0}),
    ("yml and yaml add up", {".yml": "rating: 2", ".yaml": "multiply: 3"}, {"rating": 2.0}),
    ("yaml without caption keeps txt", {".txt": "t, a", ".yaml": "multiply: 2"},
     {"caption": "t | a", "multiply": 2.0}),
    ("empty txt is an empty caption", {".txt": ""}, {"caption": ""}),
    ("blank txt, too", {".txt": " \n"}, {"caption": ""}),
    ("empty yaml, too", {".yaml": ""}, {"caption": ""}),
    ("only comments, too", {".yaml": "# nothing\n"}, {"caption": ""}),
    ("empty txt under a yaml", {".txt": "", ".yaml": "main_prompt: y"}, {"caption": "y"}),
    ("empty txt keeps inherited tags", {"global.yaml": "tags: [g]", ".txt": ""}, {"caption": " | g"}),
    ("empty txt beats an inherited prompt", {"global.yaml": "main_prompt: g", ".txt": ""}, {"caption": ""}),
    ("null is not given", {".txt": "t", ".yaml": "main_prompt: ~\nmultiply: null"},
     {"caption": "t", "multiply": 1.0}),
    ("quoted empty prompt is given", {".txt": "t", ".yaml": 'main_prompt: ""'},
     {"caption": ""}),
    ("tags only keep the name", {".yaml": "tags: [red]"}, {"caption": "cat | red"}),
    ("caption mapping", {".yaml": "caption:\n  main_prompt: m\n  tags: [a, {tag: b, weight: 2}]"},
     {"caption": "m | a, b:2"}),
    ("main_prompt over caption", {".yaml": "caption: c, a\nmain_prompt: m\ntags: [b]"}, {"caption": "m | b, a"}),
    ("global of the root", {"global.yaml": "multiply: 2"}, {"multiply": 2.0}),
    ("global as yml", {"global.yml": "multiply: 2"}, {"multiply": 2.0}),
    ("global of a parent wins", {"global.yaml": "multiply: 2", "sub/global.yaml": "multiply: 3"}, {"multiply": 3.0}),
    ("global of the folder wins", {"sub/global.yaml": "multiply: 3", "sub/deep/global.yaml": "multiply: 4"},
     {"multiply": 4.0}),
    ("globals add up", {"global.yaml": "flip_p: 0.5", "sub/global.yaml": "cond_dropout: 0.25"},
     {"flip_p": 0.5, "cond_dropout": 0.25}),
    ("folder file over global", {"sub/deep/global.yaml": "multiply: 2", "sub/deep/multiply.txt": "5"},
     {"multiply": 5.0}),
    ("local over folder file", {"sub/deep/multiply.txt": "5", "sub/deep/local.yaml": "multiply: 6"}, {"multiply": 6.0}),
    ("local as yml", {"sub/deep/local.yml": "multiply: 6"}, {"multiply": 6.0}),
    ("sidecar over local", {"sub/deep/local.yaml": "multiply: 6", ".yaml": "multiply: 7"},
     {"multiply": 7.0}),
    ("all five", {"global.yaml": "multiply: 1.5", "sub/global.yaml": "multiply: 2", "sub/deep/multiply.txt": "3",
                  "sub/deep/local.yaml": "multiply: 4", ".yaml": "multiply: 5"}, {"multiply": 5.0}),
    ("zero is a number", {"global.yaml": "cond_dropout: 0.5", "sub/deep/cond_dropout.txt": "0"}, {"cond_dropout": 0.0}),
    ("local of a parent is not inherited", {"sub/local.yaml": "multiply: 9"}, {"multiply": 1.0}),
    ("folder file of a parent is not inherited", {"sub/multiply.txt": "9"}, {"multiply": 1.0}),
    ("batch_id of a parent is not inherited", {"sub/batch_id.txt": "x"}, {"batch_id": ""}),
    ("cond_dropout.txt", {"sub/deep/cond_dropout.txt": " 0.5\n"}, {"cond_dropout": 0.5}),
    ("flip_p.txt", {"sub/deep/flip_p.txt": "0.25"}, {"flip_p": 0.25}),
    ("loss_scale.txt", {"sub/deep/loss_scale.txt": "1e-1"}, {"loss_scale": 0.1}),
    ("batch_id.txt is stripped", {"sub/deep/batch_id.txt": "\n pair 1 \n"}, {"batch_id": "pair 1"}),
    ("shuffle_tags.txt by its presence", {"sub/deep/shuffle_tags.txt": ""}, {"shuffle_tags": True}),
    ("shuffle_tags absent", {}, {"shuffle_tags": None, "flip_p": None, "cond_dropout": None}),
    ("shuffle_tags off further in", {"global.yaml": "shuffle_tags: true", "sub/deep/local.yaml": "shuffle_tags: off"},
     {"shuffle_tags": False}),
    ("shuffle_tags on again", {"global.yaml": "shuffle_tags: no", ".yaml": "shuffle_tags: yes"},
     {"shuffle_tags": True}),
    ("inherited prompt", {"global.yaml": "main_prompt: g"}, {"caption": "g"}),
    ("sidecar beats inherited prompt", {"global.yaml": "main_prompt: g", ".txt": "t"}, {"caption": "t"}),
    ("tags: most specific first", {"global.yaml": "tags: [g]", "sub/global.yaml": "tags: [p]",
                                   "sub/deep/local.yaml": "tags: [l]", ".txt": "t, s"},
     {"caption": "t | s, l, p, g"}),
    ("equal tags collapse to the specific one", {"global.yaml": "tags: [{tag: a, weight: 1}, b]",
                                                 ".yaml": "tags: [{tag: a, weight: 3}]"},
     {"caption": "cat | a:3, b"}),
    ("scalars stay as written", {".yaml": "main_prompt: on\ntags: [1, 1e-6, no, 2024-01-01]"},
     {"caption": "on | 1, 1e-6, no, 2024-01-01"}),
    ("tags as one text", {".yaml": "tags: a, b"}, {"caption": "cat | a, b"}),
    ("a tag with a comma stays one", {".yaml": 'tags: ["a, b"]'}, {"caption": "cat | a, b"}),
    ("max_caption_length", {"global.yaml": "max_caption_length: 40"}, {"max_length": 40}),
    ("rating", {"sub/deep/local.yaml": "rating: 0.5"}, {"rating": 0.5}),
    ("batch_id stays text", {"sub/deep/local.yaml": "batch_id: 007"}, {"batch_id": "007"}),
    ("utf-8 with mark", {".txt": "\ufeffkäse, 猫".encode()}, {"caption": "käse | 猫"}),
    ("utf-16", {".txt": "käse, 猫".encode("utf-16")}, {"caption": "käse | 猫"}),
    ("utf-16 yaml", {".yaml": "main_prompt: käse".encode("utf-16")}, {"caption": "käse"}),
    ("cp1252", {".txt": "käse".encode("cp1252")}, {"caption": "käse"}),
    ("unknown keys change nothing", {".yaml": "multipli: 4"}, {"multiply": 1.0}),
    ("another picture's sidecar", {"sub/deep/cat.txt": "other"}, {"caption": "cat"}),
    ("windows line ends", {".yaml": "main_prompt: m\r\nmultiply: 2\r\n"}, {"caption": "m", "multiply": 2.0}),
]  # fmt: skip


def seen(item: Any, name: str) -> Any:
    if name == "max_length":
        return item.caption.max_length
    if name != "caption":
        return getattr(item, name)
    tags = ", ".join(tag.text if tag.weight == 1 else f"{tag.text}:{tag.weight:g}" for tag in item.caption.tags)
    return f"{item.caption.main_prompt} | {tags}" if tags else item.caption.main_prompt


def write(root: Path, files: Files) -> None:
    for name, content in {".png": png(), **files}.items():
        path = root / (PICTURE + name if name.startswith(".") else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_the_table_is_long_enough() -> None:
    assert len({name for name, _, _ in CASES}) == len(CASES) >= 40


@pytest.mark.parametrize(("files", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_merge(tmp_path: Path, files: Files, expected: dict[str, Any]) -> None:
    write(tmp_path, files)
    (item,) = find_data([tmp_path]).items
    assert item.id == f"{PICTURE}.png"
    assert {name: seen(item, name) for name in expected} == expected
