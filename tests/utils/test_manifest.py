"""The manifest tells every change of its folder, and of itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from utils.manifest import MANIFEST, DamagedError, read_manifest, verify_folder, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "f"
    (folder / "sub" / "own").mkdir(parents=True)
    (folder / "a").write_bytes(b"a" * 100)
    (folder / "sub" / "b \U0001f600").write_bytes(b"")
    (folder / "skipped").mkdir()
    (folder / "skipped" / "c").write_bytes(b"c")
    write_manifest(folder, {"what": "\u00fc"}, skip="skipped")
    return folder


def test_it_lists_the_files_and_passes(folder: Path) -> None:
    content = verify_folder(folder, skip="skipped")
    assert content["what"] == "\u00fc"
    assert {name: entry["bytes"] for name, entry in content["files"].items()} == {"a": 100, "sub/b \U0001f600": 0}


def test_files_of_others_pass(folder: Path) -> None:
    (folder / "skipped" / "c").unlink()
    (folder / "README.md").write_text("mine")
    verify_folder(folder, skip="skipped")


@pytest.mark.parametrize("change", ["gone", "longer", "same length", "manifest gone"])
def test_changes_are_named(folder: Path, change: str) -> None:
    path = folder / "a"
    match change:
        case "gone":
            path.unlink()
        case "longer":
            path.write_bytes(b"a" * 101)
        case "same length":
            path.write_bytes(b"a" * 99 + b"b")
        case _:
            path = folder / MANIFEST
            path.unlink()
    with pytest.raises(DamagedError, match=path.name):
        verify_folder(folder, skip="skipped")


def test_every_byte_of_the_manifest_itself_counts(folder: Path) -> None:
    path = folder / MANIFEST
    good = path.read_bytes()
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(DamagedError):
            read_manifest(folder)
    path.write_bytes(good + b"\n")
    with pytest.raises(DamagedError, match="checksum"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "5", "{}", '"x"', "[" * 200_000, '{"checksum": 5}', '{"checksum": "x", "a": 1e999}']
)
def test_what_is_no_manifest_is_said(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(DamagedError, match=r"manifest\.json"):
        read_manifest(folder)


@pytest.mark.parametrize("files", [None, [], {"a": 5}, {"a": {"bytes": 1}}, {"a": {"bytes": "1", "sha256": "x"}}])
def test_a_forged_list_of_files_is_refused_in_words(folder: Path, files: object) -> None:
    from utils.manifest import _manifest_text

    content = json.loads((folder / MANIFEST).read_text())
    content.pop("checksum")
    (folder / MANIFEST).write_text(_manifest_text({**content, "files": files}))
    with pytest.raises(DamagedError):
        verify_folder(folder)


def test_a_manifest_cannot_point_out_of_its_folder(folder: Path) -> None:
    from utils.manifest import _manifest_text

    (folder.parent / "secret").write_bytes(b"s")
    content = json.loads((folder / MANIFEST).read_text())
    content.pop("checksum")
    content["files"]["../secret"] = {"bytes": 1, "sha256": "0"}
    (folder / MANIFEST).write_text(_manifest_text(content))
    with pytest.raises(DamagedError, match="missing"):
        verify_folder(folder)
